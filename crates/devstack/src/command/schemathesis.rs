//! `devstack schemathesis`: holds the two APIs against the documents that they serve, with requests that are made
//! from those documents.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail, ensure};
use tokio::process::Command;

use super::demo;
use crate::{folder::Folder, say, servers::Setup, shutdown::Shutdown, stack::Stack};

/// What is installed, with the hash of each file.
const REQUIREMENTS: &str = include_str!("../../schemathesis/requirements.txt");

/// What `schemathesis` is told.
#[derive(Clone, Debug, clap::Args)]
pub struct SchemathesisArgs {
    /// Options of `st run`, for both APIs (`--max-examples 1000 --seed 1`).
    #[arg(last = true, value_name = "OPTION")]
    pub options: Vec<OsString>,
}

/// Tests both APIs of a stack of its own. Exit code 1: one does not do what its document says.
pub async fn run(args: &SchemathesisArgs) -> anyhow::Result<u8> {
    let checkout = super::checkout()?;
    let shutdown = Shutdown::watch()?;
    let folder = Folder::temporary()?;
    let tested = async {
        let tool = install().await?;
        // schemathesis keeps notes in the folder that it is started in. This one goes away.
        let notes = folder.path().to_path_buf();
        let stack = Stack::start(folder, Setup::PASSING).await?;
        let addresses = stack.addresses();
        demo::play(&addresses, &checkout.join("payloads")).await?;
        let mut wrong = Vec::new();
        // The score first: it is there until somebody deletes the person.
        for (name, url) in [("score", &addresses.score_url), ("person", &addresses.person_url)] {
            let settings = checkout.join("crates/devstack/schemathesis");
            let mut st = Command::new(&tool);
            st.arg("--config-file").arg(settings.join(format!("{name}.toml")));
            st.args(["run", &format!("{url}/openapi.json"), "--continue-on-failure"]).args(&args.options);
            st.env("SCHEMATHESIS_HOOKS", settings.join("hooks.py"));
            let status = st.current_dir(&notes).kill_on_drop(true).status().await;
            if !status.with_context(|| format!("cannot start {}", tool.display()))?.success() {
                wrong.push(name);
            }
        }
        stack.stop(&shutdown.immediate).await;
        anyhow::Ok(wrong)
    };
    let Some(wrong) = shutdown.requested.run_until_cancelled(Box::pin(tested)).await else {
        bail!("schemathesis was ended");
    };
    let wrong = wrong?;
    for name in &wrong {
        say(&format!("{name}-api does not do what its document says, or says it wrongly; see above"));
    }
    Ok(u8::from(!wrong.is_empty()))
}

/// Installs schemathesis beside the build, in an environment of its own, unless it is there.
async fn install() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("cannot find the running program")?;
    let built = own.parent().and_then(Path::parent).context("the program is in no folder of a build")?;
    let home = built.join("schemathesis");
    let (tool, mark) = (home.join("bin/st"), home.join("installed"));
    if fs::read_to_string(&mark).is_ok_and(|installed| installed == REQUIREMENTS) && tool.is_file() {
        return Ok(tool);
    }
    say(&format!("installing schemathesis in {}", home.display()));
    // Of other versions, or half of one.
    if home.exists() {
        fs::remove_dir_all(&home).with_context(|| format!("cannot remove {}", home.display()))?;
    }
    let mut venv = Command::new("python3");
    done(venv.args(["-m", "venv"]).arg(&home), "make a virtual environment").await?;
    let wanted = home.join("requirements.txt");
    fs::write(&wanted, REQUIREMENTS)?;
    let mut pip = Command::new(home.join("bin/pip"));
    pip.args(["install", "--quiet", "--disable-pip-version-check", "--require-hashes", "--no-deps"]);
    done(pip.arg("--requirement").arg(&wanted), "install schemathesis").await?;
    fs::rename(&wanted, &mark)?;
    Ok(tool)
}

async fn done(command: &mut Command, what: &str) -> anyhow::Result<()> {
    let status = command.kill_on_drop(true).status().await.with_context(|| format!("cannot {what}"))?;
    ensure!(
        status.success(),
        "cannot {what}: {status}; crates/devstack/install tests installs what it takes"
    );
    Ok(())
}
