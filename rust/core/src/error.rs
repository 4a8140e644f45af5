//! The one error of this crate.

use std::fmt;
use std::path::PathBuf;

/// What can go wrong. The binding maps each kind to one Python exception.
#[derive(Debug)]
pub enum Error {
    /// An argument out of its domain. The text names the argument, what it got and what it wants.
    Argument(String),
    /// An index past the end.
    Index(String),
    /// The file system said no, at this path.
    Io(PathBuf, std::io::Error),
    /// A store whose bytes are not what was committed. The text names the file and the damage.
    Corrupt(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Argument(text) | Self::Index(text) | Self::Corrupt(text) => f.write_str(text),
            Self::Io(path, source) => write!(f, "{}: {source}", path.display()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io(_, source) => Some(source),
            _ => None,
        }
    }
}
