//! Positioned reads and writes.
//!
//! Direct reads do not go through the system's cache. They are for files larger than the memory, whose blocks would take
//! the place of others there. Linux has them.

use std::fs::File;
use std::io;
use std::path::Path;

/// A second handle of a file for direct reads; `None` where the system or the file system has none.
#[cfg(target_os = "linux")]
pub(crate) fn open_direct(path: &Path) -> Option<File> {
    let mut open = std::fs::OpenOptions::new();
    std::os::unix::fs::OpenOptionsExt::custom_flags(open.read(true), libc::O_DIRECT);
    open.open(path).inspect_err(|error| tracing::warn!(path = %path.display(), %error, "no direct reads")).ok()
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn open_direct(path: &Path) -> Option<File> {
    tracing::warn!(path = %path.display(), "no direct reads on this system");
    None
}

/// Reads at least `least` bytes into whole pages of memory, as one request: the file may end within the last page.
#[cfg(target_os = "linux")]
pub(crate) fn read_pages_at(file: &File, pages: &mut [u8], least: usize, offset: u64) -> io::Result<()> {
    loop {
        match std::os::unix::fs::FileExt::read_at(file, pages, offset) {
            Ok(n) if n >= least => return Ok(()),
            Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn read_pages_at(file: &File, pages: &mut [u8], least: usize, offset: u64) -> io::Result<()> {
    read_at(file, &mut pages[..least], offset)
}

#[cfg(unix)]
pub(crate) fn read_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
}

#[cfg(unix)]
pub(crate) fn write_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

#[cfg(windows)]
pub(crate) fn read_at(file: &File, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, bytes, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                bytes = &mut bytes[n..];
                offset += n as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(windows)]
pub(crate) fn write_at(file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_write(file, bytes, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => {
                bytes = &bytes[n..];
                offset += n as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
