//! Errors inside candle's, and how they are found there again.
//!
//! A model's functions return `candle_core::Error`, so what goes wrong in a cache comes out of them as one. Candle's own
//! `Error::wrap` keeps no more of an error than its text. An I/O error keeps the error itself, and a candle error keeps an I/O
//! error as it is: so that is the way in.

use std::error::Error as StdError;
use std::io;

use candle_core::Error;

/// Makes an error one of candle's, out of which [`find_error`] takes it again. It reads as before.
pub fn wrap_error(error: impl StdError + Send + Sync + 'static) -> Error {
    Error::Io(io::Error::other(error)).bt()
}

/// Looks for an error of type `E` in another one: in all that it was caused by, and in what candle has put around it. So a
/// scheduler sees what it acts on, behind any number of layers of a model:
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

/// What an error was made of, also where `source` leaves it out.
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
