//! `devstack chaos`: everything goes wrong at once, and the oracle says what came of it.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, bail};

use crate::{
    chaos::{self, Settings},
    ending::Ending,
    say, show,
};

/// What `chaos` is told.
#[derive(Clone, Debug, clap::Args)]
pub struct ChaosArgs {
    /// Which run: the same seed has the same faults at the same times. Any, and said, when it is not given.
    #[arg(long)]
    pub seed: Option<u64>,
    /// For how many minutes there are faults. About a minute more is quiet.
    #[arg(long, default_value = "5", value_parser = clap::value_parser!(u64).range(1..=120))]
    pub minutes: u64,
    /// The same in seconds.
    #[arg(long, conflicts_with = "minutes", value_parser = clap::value_parser!(u64).range(10..=7200))]
    pub seconds: Option<u64>,
    /// Also write everything that was found to this file.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Only show which faults there would be.
    #[arg(long)]
    pub plan: bool,
}

/// Runs it. Exit code 1: a promise was broken.
pub async fn run(args: &ChaosArgs) -> anyhow::Result<u8> {
    let seconds = args.seconds.unwrap_or(args.minutes * 60);
    let settings = Settings {
        // A short one, for people to repeat.
        seed: args.seed.unwrap_or_else(|| rand::random_range(0..1_000_000)),
        length: Duration::from_secs(seconds),
    };
    if args.plan {
        let lines: Vec<String> = settings.plan().iter().map(ToString::to_string).collect();
        show(&(lines.join("\n") + "\n"));
        return Ok(0);
    }
    let logs = super::data()?.join(format!("chaos-{}", settings.seed));
    let ending = Ending::watch()?;
    say(&format!("chaos with the seed {} for {seconds} s", settings.seed));
    let running = Box::pin(chaos::run(&settings, &logs, say));
    let Some(report) = ending.asked.run_until_cancelled(running).await else {
        bail!("the chaos was ended");
    };
    let report = report.with_context(|| format!("the seed was {}", settings.seed))?;
    show(&format!("\n{}\n", report.page()));
    if let Some(path) = &args.json {
        std::fs::write(path, report.json()?).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if report.is_green() {
        say(&format!("green: every promise was kept, {} s in all", report.numbers.seconds));
        return Ok(0);
    }
    show(&report.complaint(&logs));
    say(&format!("red: a promise was broken, with the seed {}", settings.seed));
    Ok(1)
}
