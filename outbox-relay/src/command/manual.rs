//! What a package has beside the program: completions for shells, and manual pages. Both are made of the command line itself.

use std::{fs, path::Path};

use anyhow::Context;
use clap_complete::Shell;
use daemon::cli;

use crate::cli::{Cli, TABLES};

/// The script that completes the program's commands and flags in a shell.
pub fn completions(shell: Shell) -> anyhow::Result<String> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut cli::command_with::<Cli>(Some(TABLES)), "outbox-relay", &mut script);
    String::from_utf8(script).context("the completions are not UTF-8")
}

/// Writes `outbox-relay.1` and a page for each command into the folder, which is made if it is missing.
pub fn pages(folder: &Path) -> anyhow::Result<()> {
    let written = |action| format!("cannot {action} {}", folder.display());
    fs::create_dir_all(folder).with_context(|| written("make"))?;
    clap_mangen::generate_to(cli::command_with::<Cli>(Some(TABLES)), folder)
        .with_context(|| written("write into"))
}
