//! A copy of the sources without some guards, and the programs that are built from it.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use tokio::{io::AsyncWriteExt, process::Command, time::timeout};

use super::Sabotage;

/// Timeout of a build.
const BUILD_TIMEOUT: Duration = Duration::from_mins(30);
/// Timeout of every other command.
const COMMAND_TIMEOUT: Duration = Duration::from_mins(1);

/// Builds relay and projector without these guards, and returns the folder with the programs. The checkout and its own
/// programs stay as they are.
pub async fn build(without: &[Sabotage]) -> anyhow::Result<PathBuf> {
    let copy = Copy::make(without).await?;
    copy.cargo("build").await?;
    Ok(copy.programs.join("debug"))
}

/// Checks that each of these patches fits the sources, and that relay and projector compile with all of them.
pub async fn check(without: &[Sabotage]) -> anyhow::Result<()> {
    Copy::make(without).await?.cargo("check").await
}

/// A copy of the checkout with patches applied.
struct Copy {
    source: PathBuf,
    /// Cargo's folder for the finished programs.
    programs: PathBuf,
    /// Cargo's folder for everything else: the checkout's own, which has the compiled dependencies.
    intermediate: PathBuf,
}

impl Copy {
    async fn make(without: &[Sabotage]) -> anyhow::Result<Self> {
        let checkout = devstack::command::checkout()?;
        let own = std::env::current_exe().context("cannot find the running program")?;
        // The program is in `target/debug`; a test of it is one folder below.
        let debug = own.ancestors().find(|folder| folder.ends_with("debug"));
        let target =
            debug.and_then(Path::parent).context("only debug builds can be sabotaged: run make chaos")?;
        let folder = target.join("sabotage");
        let (source, programs) = (folder.join("source"), folder.join("target"));
        update(&checkout, &source)
            .await
            .with_context(|| format!("the sources cannot be copied to {}", source.display()))?;
        mark(&source.join("Cargo.toml"))?;
        for guard in without {
            apply(guard.patch(), &source).await.with_context(|| {
                format!("crates/chaos/sabotage/{}.patch does not fit the sources any more", guard.name())
            })?;
        }
        Ok(Self { source, programs, intermediate: target.to_owned() })
    }

    /// Runs a command of cargo for the two programs.
    async fn cargo(&self, command: &str) -> anyhow::Result<()> {
        let cargo = Command::new("cargo")
            .args([command, "--quiet", "--bin", "outbox-relay", "--bin", "score-projector"])
            .current_dir(&self.source)
            .env("CARGO_TARGET_DIR", &self.programs)
            .env("CARGO_BUILD_BUILD_DIR", &self.intermediate)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .status();
        let ended = timeout(BUILD_TIMEOUT, cargo).await;
        let status = ended.with_context(|| format!("cargo took longer than {BUILD_TIMEOUT:?}"))??;
        ensure!(status.success(), "cargo {command} fails without the guard: {status}");
        Ok(())
    }
}

/// Gives the crates of the copy a version of their own. Cargo names what it compiles by a crate's version and by its path
/// in the workspace, so the copy would otherwise overwrite what the checkout has compiled.
fn mark(manifest: &Path) -> anyhow::Result<()> {
    let text = fs::read_to_string(manifest)?;
    let (before, rest) =
        text.split_once("[workspace.package]\nversion = \"").context("the workspace has no version")?;
    let (version, after) = rest.split_once('"').context("the version of the workspace does not end")?;
    fs::write(manifest, format!("{before}[workspace.package]\nversion = \"{version}+sabotage\"{after}"))?;
    Ok(())
}

/// Makes `copy` equal to the checkout, and writes only the files that differ, since cargo goes by their times.
async fn update(checkout: &Path, copy: &Path) -> anyhow::Result<()> {
    let listing = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(checkout)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let listed = timeout(COMMAND_TIMEOUT, listing).await.context("git does not end")??;
    ensure!(listed.status.success(), "git ls-files: {}", String::from_utf8_lossy(&listed.stderr));
    let names = String::from_utf8(listed.stdout).context("a file's name is not UTF-8")?;
    // Git also lists a file that was removed and whose removal is not committed.
    let names = names.split_terminator('\0').filter(|name| checkout.join(name).symlink_metadata().is_ok());
    let files: BTreeSet<PathBuf> = names.map(PathBuf::from).collect();
    fs::create_dir_all(copy)?;
    let mut present = Vec::new();
    list(copy, &mut present)?;
    for file in present {
        if file.strip_prefix(copy).is_ok_and(|name| !files.contains(name)) {
            fs::remove_file(&file)?;
        }
    }
    for name in &files {
        let (from, to) = (checkout.join(name), copy.join(name));
        fs::create_dir_all(to.parent().unwrap_or(copy))?;
        if from.is_symlink() {
            let destination = fs::read_link(&from)?;
            if fs::read_link(&to).ok().as_ref() != Some(&destination) {
                let _ = fs::remove_file(&to);
                std::os::unix::fs::symlink(destination, &to)?;
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

/// Lists the files below a folder, and symbolic links as such.
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
        // The copy lies inside of a checkout, and is not a part of it.
        .env("GIT_CEILING_DIRECTORIES", copy.parent().unwrap_or(copy))
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let mut stdin = git.stdin.take().context("git has no input")?;
    stdin.write_all(patch.as_bytes()).await?;
    drop(stdin);
    let ended = timeout(COMMAND_TIMEOUT, git.wait_with_output()).await.context("git does not end")??;
    if !ended.status.success() {
        bail!("{}", String::from_utf8_lossy(&ended.stderr).trim());
    }
    Ok(())
}
