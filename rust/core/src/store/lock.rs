//! Writers and repairs keep out of each other's way: writers share a lock on the file `lock`, a repair has it alone.
//! The system lets go of a lock when its process ends, however it ends.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::path::Path;
use std::thread;
use std::time::Duration;

use super::format::LOCK;
use crate::Error;

/// A lock that is held as long as this lives.
#[derive(Debug)]
pub(super) struct Lock {
    file: File,
    process: u32,
}

impl Lock {
    fn new(file: File) -> Self {
        Self { file, process: std::process::id() }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing is not enough where a forked process has the file too; and that one must not unlock it for us.
        if std::process::id() == self.process {
            let _ = self.file.unlock();
        }
    }
}

/// For a writer. `None` on a file system without locks.
pub(super) fn share(folder: &Path) -> Result<Option<Lock>, Error> {
    let file = open(folder)?;
    // `verify` has the lock for an instant, to see whether anybody writes.
    for _ in 0..50 {
        match file.try_lock_shared() {
            Ok(()) => return Ok(Some(Lock::new(file))),
            Err(TryLockError::WouldBlock) => thread::sleep(Duration::from_millis(10)),
            Err(TryLockError::Error(_)) => return Ok(None),
        }
    }
    Err(Error::Argument(format!("{} is being repaired: open a writer after that", folder.display())))
}

/// For a repair. `None` while somebody writes.
pub(super) fn alone(folder: &Path) -> Result<Option<Lock>, Error> {
    let file = open(folder)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(Lock::new(file))),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(Error::Io(folder.join(LOCK), error)),
    }
}

/// Whether somebody writes, as far as the file system tells.
pub(super) fn is_shared(folder: &Path) -> bool {
    match File::open(folder.join(LOCK)) {
        Ok(file) => match file.try_lock() {
            Ok(()) => {
                drop(Lock::new(file));
                false
            }
            Err(error) => matches!(error, TryLockError::WouldBlock),
        },
        Err(error) => error.kind() != ErrorKind::NotFound,
    }
}

fn open(folder: &Path) -> Result<File, Error> {
    let path = folder.join(LOCK);
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
    file.map_err(|error| Error::Io(path, error))
}
