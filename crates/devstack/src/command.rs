//! The commands of `devstack`.

pub mod demo;
pub mod env;
pub mod run;
pub mod schemathesis;
pub mod up;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;

/// The checkout: the folder of the workspace, from wherever in it the command was started.
pub fn checkout() -> anyhow::Result<PathBuf> {
    let here = std::env::current_dir().context("the folder you are in is gone")?;
    here.ancestors()
        .find(|folder| folder.join("crates/devstack/Cargo.toml").is_file())
        .map(Path::to_path_buf)
        .context("this is not a checkout of the project: no folder above has crates/devstack/Cargo.toml")
}

/// Where `up` keeps its data.
pub fn data() -> anyhow::Result<PathBuf> {
    Ok(checkout()?.join(".devstack"))
}

/// Runs a command to its end. An error is said, and is exit code 1.
pub fn exit(work: impl Future<Output = anyhow::Result<u8>>) -> ExitCode {
    let done = tokio::runtime::Runtime::new().map_err(Into::into).and_then(|runtime| runtime.block_on(work));
    match done {
        Ok(code) => code.into(),
        Err(error) => {
            crate::say(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}
