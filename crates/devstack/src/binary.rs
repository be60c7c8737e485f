//! Where the project's programs are.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

/// The project's program `name`: next to the running one, or above its folder `deps`, where cargo puts
/// test binaries.
pub fn find(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("cannot find the running program")?;
    let folder = own.parent().unwrap_or(Path::new("."));
    let folder = if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder };
    let file = folder.join(name);
    if file.is_file() {
        return Ok(file);
    }
    bail!("{} is not there; run: cargo build --workspace", file.display())
}
