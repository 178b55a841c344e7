//! Errors wrapped in candle's error type, and how to find them there.
//!
//! A model's functions return `candle_core::Error`, so an error of the cache has to be wrapped in one. Candle's own
//! `Error::wrap` keeps only the text of an error. An `io::Error` keeps the error itself, and a candle error keeps an
//! `io::Error` unchanged, so errors are wrapped as I/O errors.

use std::error::Error as StdError;
use std::io;

use candle_core::Error;

/// Wraps an error in candle's error type. The text stays the same, and [`find_error`] finds the error again.
pub fn wrap_error(error: impl StdError + Send + Sync + 'static) -> Error {
    Error::Io(io::Error::other(error)).bt()
}

/// Finds an error of type `E` in `error`: the error itself, any of its causes, and any error that candle has wrapped or
/// added context to. A scheduler uses it to tell, for example, a full pool from a fault, through any number of layers
/// of a model:
///
/// ```
/// use paged_attention::{AttendError, find_error, wrap_error};
///
/// fn model() -> candle_core::Result<()> {
///     Err(wrap_error(AttendError::EmptyStep).context("layer 3"))
/// }
///
/// let error = model().unwrap_err();
/// assert_eq!(find_error(&error), Some(&AttendError::EmptyStep));
/// ```
pub fn find_error<'e, E: StdError + 'static>(error: &'e (dyn StdError + 'static)) -> Option<&'e E> {
    let mut link = Some(error);
    while let Some(error) = link {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        link = inside(error);
    }
    None
}

/// The error inside an error, also where `source` does not return it.
fn inside<'e>(error: &'e (dyn StdError + 'static)) -> Option<&'e (dyn StdError + 'static)> {
    if let Some(error) = error.downcast_ref::<io::Error>() {
        return Some(error.get_ref()?);
    }
    let Some(of_candle) = error.downcast_ref::<Error>() else { return error.source() };
    match of_candle {
        Error::WithBacktrace { inner, .. } | Error::Context { inner, .. } | Error::WithPath { inner, .. } => {
            Some(&**inner)
        }
        Error::Io(error) => Some(error),
        Error::Cuda(error) => Some(&**error),
        _ => error.source(),
    }
}
