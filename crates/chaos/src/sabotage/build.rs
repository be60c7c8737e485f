//! A copy of the sources in which guards are taken out, and the programs that are built from it.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use tokio::{io::AsyncWriteExt, process::Command, time::timeout};

use crate::sabotage::Sabotage;

/// No build takes longer.
const BUILD: Duration = Duration::from_mins(30);
/// No other command does.
const COMMAND: Duration = Duration::from_mins(1);

/// Builds the programs without these guards, and returns the folder that they are in. The checkout itself and its
/// programs stay as they are.
pub async fn build(without: &[Sabotage]) -> anyhow::Result<PathBuf> {
    let checkout = devstack::command::checkout()?;
    let own = std::env::current_exe().context("cannot find the running program")?;
    // The program is in `target/debug`; a test of it is one deeper.
    let built = own.ancestors().find(|folder| folder.ends_with("debug")).and_then(Path::parent);
    let built = built.context("guards are taken out of debug builds: run make chaos")?;
    let place = built.join("sabotage");
    let (copy, target) = (place.join("source"), place.join("target"));
    update(&checkout, &copy)
        .await
        .with_context(|| format!("the sources cannot be copied to {}", copy.display()))?;
    for one in without {
        apply(one.patch(), &copy).await.with_context(|| {
            format!("crates/chaos/sabotage/{}.patch does not fit the sources any more", one.name())
        })?;
    }
    let cargo = Command::new("cargo")
        .args(["build", "--quiet", "--bin", "outbox-relay", "--bin", "score-projector"])
        .current_dir(&copy)
        // Not the checkout's: cargo names what it builds by paths in the workspace, and would take the one for the other.
        .env("CARGO_TARGET_DIR", &target)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .status();
    let status =
        timeout(BUILD, cargo).await.with_context(|| format!("cargo took longer than {BUILD:?}"))??;
    ensure!(status.success(), "the programs cannot be built without a guard: {status}");
    Ok(target.join("debug"))
}

/// Makes `copy` what the checkout is, and touches only what differs: cargo goes by the times of files.
async fn update(checkout: &Path, copy: &Path) -> anyhow::Result<()> {
    let listing = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(checkout)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let listed = timeout(COMMAND, listing).await.context("git does not end")??;
    ensure!(listed.status.success(), "git ls-files: {}", String::from_utf8_lossy(&listed.stderr));
    let names = String::from_utf8(listed.stdout).context("a file's name is not UTF-8")?;
    // What was removed and is not committed is listed, too.
    let names = names.split_terminator('\0').filter(|name| checkout.join(name).symlink_metadata().is_ok());
    let files: BTreeSet<PathBuf> = names.map(PathBuf::from).collect();
    fs::create_dir_all(copy)?;
    let mut there = Vec::new();
    list(copy, &mut there)?;
    for file in there {
        if file.strip_prefix(copy).is_ok_and(|name| !files.contains(name)) {
            fs::remove_file(&file)?;
        }
    }
    for name in &files {
        let (from, to) = (checkout.join(name), copy.join(name));
        fs::create_dir_all(to.parent().unwrap_or(copy))?;
        if from.is_symlink() {
            let leads = fs::read_link(&from)?;
            if fs::read_link(&to).ok().as_ref() != Some(&leads) {
                let _ = fs::remove_file(&to);
                std::os::unix::fs::symlink(leads, &to)?;
            }
        } else {
            let content = fs::read(&from)?;
            if fs::read(&to).ok().as_ref() != Some(&content) {
                fs::write(&to, content)?;
            }
        }
    }
    Ok(())
}

/// The files under a folder, with the links themselves.
fn list(folder: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            list(&entry.path(), files)?;
        } else {
            files.push(entry.path());
        }
    }
    Ok(())
}

async fn apply(patch: &str, copy: &Path) -> anyhow::Result<()> {
    let mut git = Command::new("git")
        .args(["apply", "-"])
        .current_dir(copy)
        // The copy lies in a checkout, and is none.
        .env("GIT_CEILING_DIRECTORIES", copy.parent().unwrap_or(copy))
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let mut stdin = git.stdin.take().context("git has no input")?;
    stdin.write_all(patch.as_bytes()).await?;
    drop(stdin);
    let ended = timeout(COMMAND, git.wait_with_output()).await.context("git does not end")??;
    if !ended.status.success() {
        bail!("{}", String::from_utf8_lossy(&ended.stderr).trim());
    }
    Ok(())
}
