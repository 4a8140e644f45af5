//! Refuses to build a wheel without its Triton kernels.
//!
//! `python/lewm/kernels` is a symlink to the top-level `kernels/`. A checkout that lost it (a zip file, Windows without
//! `core.symlinks`) would otherwise build a wheel that imports nothing from `lewm.kernels` and says nothing about it.

use std::path::Path;

fn main() {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../python/lewm");
    println!("cargo:rerun-if-changed={}", python.join("kernels").display());
    assert!(
        !python.exists() || python.join("kernels/sigreg.py").exists(),
        "python/lewm/kernels does not lead to kernels/: this checkout lost its symbolic links. \
         Clone again with `git -c core.symlinks=true clone` (on Windows: developer mode on), or install from PyPI."
    );
}
