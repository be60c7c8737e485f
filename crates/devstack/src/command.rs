//! The commands of `devstack`.

pub mod bench;
pub mod chaos;
pub mod demo;
pub mod env;
pub mod run;
pub mod schemathesis;
pub mod up;

use std::path::{Path, PathBuf};

use anyhow::Context;

/// The checkout: the folder of the workspace, from wherever in it the command was started.
fn checkout() -> anyhow::Result<PathBuf> {
    let here = std::env::current_dir().context("the folder you are in is gone")?;
    here.ancestors()
        .find(|folder| folder.join("crates/devstack/Cargo.toml").is_file())
        .map(Path::to_path_buf)
        .context("this is not a checkout of the project: no folder above has crates/devstack/Cargo.toml")
}

/// Where `up` keeps its data.
fn data() -> anyhow::Result<PathBuf> {
    Ok(checkout()?.join(".devstack"))
}
