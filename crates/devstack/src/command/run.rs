//! `devstack run -- COMMAND`: private servers around a command, and nothing left of them afterwards.

use std::{
    ffi::OsString,
    os::unix::process::ExitStatusExt,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use anyhow::Context;
use rustix::process::{Pid, Signal};
use tokio::process::Child;

use crate::{
    folder::Folder,
    proc::{self, MARK},
    say,
    servers::{Servers, Setup},
    shutdown::Shutdown,
    testing::{AMQP_URL, MANAGEMENT_URL, POSTGRES_URL},
};

/// How long COMMAND may take to end after it was asked to.
const GRACE: Duration = Duration::from_secs(5);

/// Runs `command` with the servers' addresses in its environment; the result is its exit code.
pub async fn run(command: &[OsString]) -> anyhow::Result<u8> {
    let shutdown = Shutdown::watch()?;
    let given = [POSTGRES_URL, AMQP_URL, MANAGEMENT_URL].map(std::env::var);
    if let [Ok(postgres), Ok(amqp), Ok(management)] = given {
        say("using the servers that DEVSTACK_POSTGRES_URL, _AMQP_URL and _MANAGEMENT_URL name");
        return around(command, [postgres, amqp, management], None, &shutdown).await;
    }
    let folder = Folder::temporary()?;
    let starting = shutdown.requested.run_until_cancelled(Servers::start(&folder, Setup::PASSING)).await;
    let Some(servers) = starting else { return Ok(130) };
    let mut servers = servers?;
    let urls = [servers.postgres.url(), servers.rabbitmq.url(), servers.rabbitmq.management_url()];
    let code = around(command, urls, Some(folder.mark()), &shutdown).await;
    // The data goes away, so there is nothing to save.
    shutdown.immediate.cancel();
    servers.stop(&shutdown.immediate).await;
    code
}

async fn around(
    command: &[OsString],
    [postgres, amqp, management]: [String; 3],
    mark: Option<&str>,
    shutdown: &Shutdown,
) -> anyhow::Result<u8> {
    let (program, args) = command.split_first().context("there is no command to run")?;
    let mut child = std::process::Command::new(program);
    child.args(args).env(POSTGRES_URL, postgres).env(AMQP_URL, amqp).env(MANAGEMENT_URL, management);
    child.envs(mark.map(|mark| (MARK, mark)));
    // It stays in this process group: it may use the terminal, and Ctrl-C reaches it directly.
    let child = tokio::process::Command::from(child).stdin(Stdio::inherit()).spawn();
    let mut child = child.with_context(|| format!("cannot start {}", program.display()))?;
    let status = match shutdown.requested.run_until_cancelled(child.wait()).await {
        Some(status) => status?,
        None => end(&mut child, shutdown).await?,
    };
    Ok(code(status))
}

/// Ends COMMAND and what it has started: asks, then kills.
async fn end(child: &mut Child, shutdown: &Shutdown) -> anyhow::Result<ExitStatus> {
    let Some(pid) = child.id().and_then(|id| Pid::from_raw(id.try_into().ok()?)) else {
        return Ok(child.wait().await?);
    };
    let tree = || [vec![pid], proc::descendants(pid)].concat();
    let asked = tree();
    proc::signal(&asked, Signal::TERM);
    let all_ended = async {
        let status = child.wait().await;
        while asked.iter().any(|pid| proc::runs(*pid)) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        status
    };
    if let Some(Ok(status)) =
        shutdown.immediate.run_until_cancelled(tokio::time::timeout(GRACE, all_ended)).await
    {
        return Ok(status?);
    }
    say("the command does not end: killing it");
    proc::signal(&[asked, tree()].concat(), Signal::KILL);
    Ok(child.wait().await?)
}

/// A command that a signal ended has the code that a shell would give it.
fn code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| code.try_into().ok()).unwrap_or(1)
}
