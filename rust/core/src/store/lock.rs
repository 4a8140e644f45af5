//! Writers and repairs keep out of each other's way: writers share a lock on the file `lock`, a repair has it alone.
//! The system lets go of a lock when its process ends, however it ends.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::path::Path;
use std::thread;
use std::time::Duration;

use super::format::LOCK;
use crate::Error;

/// For a writer, as long as the file lives. `None` on a file system without locks.
pub(super) fn share(folder: &Path) -> Result<Option<File>, Error> {
    let file = open(folder)?;
    // `verify` has the lock for an instant, to see whether anybody writes.
    for _ in 0..50 {
        match file.try_lock_shared() {
            Ok(()) => return Ok(Some(file)),
            Err(TryLockError::WouldBlock) => thread::sleep(Duration::from_millis(10)),
            Err(TryLockError::Error(_)) => return Ok(None),
        }
    }
    Err(Error::Argument(format!("{} is being repaired: open a writer after that", folder.display())))
}

/// For a repair, as long as the file lives. `None` while somebody writes.
pub(super) fn alone(folder: &Path) -> Result<Option<File>, Error> {
    let file = open(folder)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(Error::Io(folder.join(LOCK), error)),
    }
}

/// Whether somebody writes, as far as the file system tells.
pub(super) fn is_shared(folder: &Path) -> bool {
    match File::open(folder.join(LOCK)) {
        Ok(file) => matches!(file.try_lock(), Err(TryLockError::WouldBlock)),
        Err(error) => error.kind() != ErrorKind::NotFound,
    }
}

fn open(folder: &Path) -> Result<File, Error> {
    let path = folder.join(LOCK);
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
    file.map_err(|error| Error::Io(path, error))
}
