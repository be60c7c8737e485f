//! Two-phase shutdown and an honest exit code: a signal, stop taking work, drain with a deadline, end.
//! A task that dies takes the process down with its error; a second signal ends it at once.

use std::{
    future::Future,
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, anyhow};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument;

use crate::config::SettingError;

/// How long the program may finish its work.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct ShutdownArgs {
    /// How long the program may finish its work after SIGTERM. Then it ends all the same.
    #[arg(long, env = "DRAIN_TIMEOUT", default_value = "10s", value_parser = crate::config::duration, value_name = "DURATION")]
    pub drain_timeout: Duration,
}

/// The end of `main`: prints an error with its causes in one line. The exit code is 1; 2 for a setting, as for a wrong
/// command line, because a retry would not help.
pub fn exit_code(program: &str, result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{program}: {}", escape::lines(&format!("{error:#}")));
            if error.is::<SettingError>() { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}

/// The process's end, shared by all of its tasks; or that of a part of it.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    requested: CancellationToken,
    tasks: TaskTracker,
    failure: Arc<Mutex<Option<anyhow::Error>>>,
}

impl Shutdown {
    /// A shutdown without signals: tests call [`request`](Self::request).
    pub fn new() -> Self {
        Self::default()
    }

    /// A shutdown that SIGTERM and SIGINT request. The second signal ends the process at once, with
    /// the exit code that the signal would have given.
    pub fn on_signals() -> anyhow::Result<Self> {
        let shutdown = Self::new();
        let mut terminate = signal(SignalKind::terminate()).context("SIGTERM cannot be handled")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT cannot be handled")?;
        let requested = shutdown.requested.clone();
        tokio::spawn(async move {
            loop {
                let (name, code) = tokio::select! {
                    _ = terminate.recv() => ("SIGTERM", 143),
                    _ = interrupt.recv() => ("SIGINT", 130),
                };
                if requested.is_cancelled() {
                    tracing::warn!(signal = name, "ending at once");
                    std::process::exit(code);
                }
                tracing::info!(signal = name, "draining; a second signal ends at once");
                requested.cancel();
            }
        });
        Ok(shutdown)
    }

    /// The end of a part of the process: when `requested` is cancelled, or when one of the part's own tasks fails. The rest
    /// of the process does not notice.
    #[must_use]
    pub fn part(requested: &CancellationToken) -> Self {
        Self { requested: requested.child_token(), ..Self::default() }
    }

    /// Cancelled once the end is requested: race it against waiting, never against work.
    pub fn requested(&self) -> &CancellationToken {
        &self.requested
    }

    /// Requests the end.
    pub fn request(&self) {
        self.requested.cancel();
    }

    /// Runs a task for as long as the process lives. When it fails, or ends before it was asked to,
    /// the process ends too, and says so.
    pub fn spawn<F>(&self, name: &'static str, task: F)
    where
        F: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        let (requested, failure) = (self.requested.clone(), Arc::clone(&self.failure));
        let task = tokio::spawn(task.in_current_span());
        self.tasks.spawn(async move {
            let error = match task.await {
                Ok(Ok(())) if requested.is_cancelled() => return,
                Ok(Ok(())) => anyhow!("it ended before the shutdown"),
                Ok(Err(error)) => error,
                Err(panic) => anyhow!("it panicked: {panic}"),
            };
            failure
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .get_or_insert(error.context(format!("the task {name} failed")));
            requested.cancel();
        });
    }

    /// Waits for the request, then for the tasks, at most `deadline`. The error of the first task that
    /// failed is the process's own.
    pub async fn finish(self, deadline: Duration) -> anyhow::Result<()> {
        self.requested.cancelled().await;
        self.tasks.close();
        let drained = tokio::time::timeout(deadline, self.tasks.wait()).await;
        if let Some(error) = self.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(error);
        }
        drained.map_err(|_| {
            anyhow!(
                "{} tasks did not finish within {deadline:?}; the next start continues their work",
                self.tasks.len()
            )
        })
    }
}
