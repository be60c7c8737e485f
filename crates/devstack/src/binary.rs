//! Where the project's programs are.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

/// Names the folder with the programs, if they are not next to the running program: the bench and the programs that it
/// measures are built with different profiles.
const PROGRAMS: &str = "DEVSTACK_PROGRAMS";

/// The file of the program `name`: in the folder that the variable `DEVSTACK_PROGRAMS` names, or next to the running
/// program.
pub fn find(name: &str) -> anyhow::Result<PathBuf> {
    match std::env::var_os(PROGRAMS) {
        Some(folder) => existing(PathBuf::from(folder).join(name)),
        None => beside(name),
    }
}

/// The file `name` next to the running program, or above its folder `deps`, where cargo puts test binaries.
pub(crate) fn beside(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("cannot find the running program")?;
    let folder = own.parent().unwrap_or(Path::new("."));
    let folder = if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder };
    existing(folder.join(name))
}

fn existing(file: PathBuf) -> anyhow::Result<PathBuf> {
    if file.is_file() {
        return Ok(file);
    }
    bail!("{} is not there; run: cargo build --workspace", file.display())
}
