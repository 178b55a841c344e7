//! A file of results. [`Output::prepare`] checks before the work that the file can be written. [`Output::write`]
//! replaces the file only when all of it has been written.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tempfile::{Builder, NamedTempFile};

/// A file that can be written.
#[derive(Debug)]
pub(crate) struct Output {
    path: PathBuf,
    /// Whether the file can be replaced by another. Pipes and devices cannot, nor can files in folders in which no file
    /// can be created: they are overwritten in place.
    replaced: bool,
}

impl Output {
    /// Checks that `path` can be written. Changes nothing.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub(crate) fn prepare(path: &Path) -> Result<Self> {
        Self::prepared(path).with_context(|| format!("cannot write {}", path.display()))
    }

    fn prepared(path: &Path) -> io::Result<Self> {
        match fs::metadata(path) {
            Ok(about) if about.is_file() => {
                OpenOptions::new().append(true).open(path)?;
                // Of a symbolic link, the target is replaced, not the link.
                let path = fs::canonicalize(path)?;
                Ok(Self { replaced: temporary(&path).is_ok(), path })
            }
            Ok(about) if about.is_dir() => Err(ErrorKind::IsADirectory.into()),
            // Not opened: when a pipe is closed again, its reader sees the end of the file.
            Ok(_) => Ok(Self { path: path.to_owned(), replaced: false }),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                OpenOptions::new().write(true).create_new(true).open(path)?;
                fs::remove_file(path)?;
                Ok(Self { path: path.to_owned(), replaced: true })
            }
            Err(error) => Err(error),
        }
    }

    /// Writes the whole file. An older file stays unchanged until the new one is complete.
    ///
    /// # Errors
    ///
    /// If `write` or the file system fails.
    pub(crate) fn write(&self, write: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
        self.written(write).with_context(|| format!("cannot write {}", self.path.display()))
    }

    fn written(&self, write: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
        let fill = |file: &File| {
            let mut file = BufWriter::new(file);
            write(&mut file)?;
            Ok(file.flush()?)
        };
        if !self.replaced {
            return fill(&File::create(&self.path)?);
        }
        let temporary = temporary(&self.path)?;
        fill(temporary.as_file())?;
        if let Ok(about) = fs::metadata(&self.path) {
            temporary.as_file().set_permissions(about.permissions())?;
        }
        if let Err(error) = temporary.persist(&self.path) {
            // A mounted file cannot be replaced, so the content is copied into it.
            fs::copy(error.file.path(), &self.path)?;
        }
        Ok(())
    }
}

/// A temporary file in the folder of `path`, where it can be renamed to `path`.
fn temporary(path: &Path) -> io::Result<NamedTempFile> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = Builder::new();
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // The permissions of any new file. By default, only its owner can access a temporary file.
        builder.permissions(fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(folder)
}

#[cfg(test)]
mod tests {
    use anyhow::bail;
    use tempfile::TempDir;

    use super::*;

    fn names(folder: &TempDir) -> Vec<String> {
        let names = fs::read_dir(folder.path()).unwrap();
        names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn the_file_appears_only_when_it_is_complete() -> Result<()> {
        let folder = TempDir::new()?;
        let path = folder.path().join("out.json");
        let output = Output::prepare(&path)?;
        assert!(names(&folder).is_empty());
        output.write(|file| {
            file.write_all(b"half")?;
            assert!(!path.exists());
            Ok(file.write_all(b" whole")?)
        })?;
        assert_eq!((fs::read_to_string(&path)?.as_str(), names(&folder).len()), ("half whole", 1));
        Ok(())
    }

    #[test]
    fn a_failure_leaves_an_older_file_unchanged() -> Result<()> {
        let folder = TempDir::new()?;
        let path = folder.path().join("out.json");
        fs::write(&path, "older")?;
        let output = Output::prepare(&path)?;
        assert_eq!(fs::read_to_string(&path)?, "older");
        let error = output.write(|file| {
            file.write_all(b"half")?;
            bail!("out of words")
        });
        assert!(format!("{:#}", error.unwrap_err()).ends_with("out.json: out of words"));
        assert_eq!((fs::read_to_string(&path)?.as_str(), names(&folder).len()), ("older", 1));
        output.write(|file| Ok(file.write_all(b"new")?))?;
        assert_eq!((fs::read_to_string(&path)?.as_str(), names(&folder).len()), ("new", 1));
        Ok(())
    }

    #[test]
    fn an_unwritable_path_is_refused_before_the_work() -> Result<()> {
        let folder = TempDir::new()?;
        fs::write(folder.path().join("file"), "")?;
        let long = "x".repeat(300);
        for path in [".", "missing/out.json", "file/out.json", "missing/", "", &long] {
            let path = if path.is_empty() { PathBuf::new() } else { folder.path().join(path) };
            let error = Output::prepare(&path).expect_err("it cannot be written").to_string();
            assert_eq!(error, format!("cannot write {}", path.display()));
        }
        assert_eq!(names(&folder), ["file"]);
        Ok(())
    }

    #[cfg(unix)]
    #[test]
    fn links_permissions_and_devices_are_preserved() -> Result<()> {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let folder = TempDir::new()?;
        let (path, link) = (folder.path().join("out.json"), folder.path().join("link"));
        fs::write(&path, "older")?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640))?;
        symlink("out.json", &link)?;
        Output::prepare(&link)?.write(|file| Ok(file.write_all(b"new")?))?;
        assert!(fs::symlink_metadata(&link)?.is_symlink());
        assert_eq!(
            (fs::read_to_string(&path)?.as_str(), fs::metadata(&path)?.permissions().mode() & 0o777),
            ("new", 0o640)
        );
        Output::prepare(Path::new("/dev/null"))?.write(|file| Ok(file.write_all(b"new")?))?;
        assert!(!fs::metadata("/dev/null")?.is_file());

        // Root can open the file in spite of its permissions.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o440))?;
        if OpenOptions::new().append(true).open(&path).is_err() {
            assert!(Output::prepare(&path).is_err());
        }
        Ok(())
    }
}
