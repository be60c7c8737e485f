//! The command line of `make chaos`.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, bail};
use clap::ValueEnum;

use crate::{
    report::Report,
    run,
    sabotage::Sabotage,
    settings::{LostTime, Settings},
};
use devstack::{say, show, shutdown::Shutdown};

/// The arguments of `chaos`.
#[derive(Clone, Debug, clap::Args)]
pub struct ChaosArgs {
    /// The seed of the plan: the same seed has the same faults at the same times. Without it the run chooses one and
    /// prints it.
    #[arg(long)]
    pub seed: Option<u64>,
    /// How many minutes the faults last. Start, recovery and the check of the result take about a minute more.
    #[arg(long, default_value = "5", value_parser = clap::value_parser!(u64).range(1..=120))]
    pub minutes: u64,
    /// How many seconds the faults last.
    #[arg(long, conflicts_with = "minutes", value_parser = clap::value_parser!(u64).range(10..=7200))]
    pub seconds: Option<u64>,
    /// Also write the report as JSON to this file.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Remove a guard from a program, inject the faults that the guard is for, and check that the oracle finds the
    /// violation. Exit code 1 if it does not. `all` takes one guard after the other. Relay and projector are built
    /// from a copy of the sources.
    #[arg(long, value_name = "GUARD", value_parser = guards, conflicts_with_all = ["minutes", "seconds"])]
    pub sabotage: Option<Guards>,
    /// Inject this fault alone: a backup is restored, or a standby is promoted that lacked the last commits. The
    /// documented procedure follows. May be repeated; the faults come in this order.
    #[arg(long, value_name = "FAULT", conflicts_with = "sabotage")]
    pub only: Vec<LostTime>,
    /// Print the plan of faults, and start nothing.
    #[arg(long)]
    pub plan: bool,
}

/// Guards to remove, one at a time.
#[derive(Clone, Debug)]
pub struct Guards(Vec<Sabotage>);

fn guards(name: &str) -> Result<Guards, String> {
    if name == "all" {
        return Ok(Guards(Sabotage::ALL.to_vec()));
    }
    match Sabotage::from_str(name, false) {
        Ok(one) => Ok(Guards(vec![one])),
        Err(_) => {
            Err("it should be all, confirms, low-water, snapshot, memory, commit or duplicates".to_owned())
        }
    }
}

/// Runs it. Exit code 1: a promise was broken; or, without a guard, the oracle found no violation.
pub async fn run(args: &ChaosArgs) -> anyhow::Result<u8> {
    // Short, so that people can type it again.
    let seed = args.seed.unwrap_or_else(|| rand::random_range(0..1_000_000));
    let length = Duration::from_secs(args.seconds.unwrap_or(args.minutes * 60));
    let mut runs = vec![Settings { seed, length, sabotage: None, only: args.only.clone() }];
    if let Some(Guards(guards)) = &args.sabotage {
        if !cfg!(debug_assertions) {
            bail!("only debug builds can be sabotaged: run make chaos");
        }
        let run =
            |one: &Sabotage| Settings { seed, length: one.length(), sabotage: Some(*one), only: Vec::new() };
        runs = guards.iter().map(run).collect();
    }
    if args.plan {
        let lines = runs.iter().flat_map(Settings::plan).map(|fault| fault.to_string() + "\n");
        show(&lines.collect::<String>());
        return Ok(0);
    }
    let shutdown = Shutdown::watch()?;
    let mut code = 0;
    let mut reports = Vec::new();
    for settings in &runs {
        let (report, as_expected) =
            one(settings, &shutdown).await.with_context(|| format!("the seed was {seed}"))?;
        code |= u8::from(!as_expected);
        reports.push(report);
    }
    if let Some(path) = &args.json {
        let json = match reports.as_slice() {
            [report] => report.json()?,
            reports => serde_json::to_string_pretty(reports)? + "\n",
        };
        std::fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(code)
}

/// One run, and whether it ended as expected.
async fn one(settings: &Settings, shutdown: &Shutdown) -> anyhow::Result<(Report, bool)> {
    let Settings { seed, length, sabotage, .. } = settings;
    let name = sabotage.map_or_else(|| seed.to_string(), |sabotage| format!("{seed}-{}", sabotage.name()));
    let logs = devstack::command::data()?.join(format!("chaos-{name}"));
    let without = sabotage.map(|sabotage| format!(", without a guard: the program {}", sabotage.words()));
    say(&format!(
        "faults for {} s with the seed {seed}{}",
        length.as_secs(),
        without.as_deref().unwrap_or_default()
    ));
    let running = Box::pin(run::run(settings, &logs, say));
    let Some(report) = shutdown.requested.run_until_cancelled(running).await else {
        bail!("the run was interrupted");
    };
    let report = report?;
    show(&format!("\n{}\n", report.page()));
    if !report.is_green() {
        show(&report.complaint(&logs));
    }
    let seconds = report.numbers.seconds;
    let as_expected = match sabotage {
        None if report.is_green() => {
            say(&format!("green: every promise was kept, {seconds} s in all"));
            true
        }
        None => {
            say(&format!("red: a promise was broken, with the seed {seed}"));
            false
        }
        Some(sabotage) => {
            let found: Vec<_> =
                report.violations().into_iter().filter(|c| sabotage.seen_as().contains(c)).collect();
            match found.as_slice() {
                [] => {
                    say(&format!("the oracle found no violation, although the program {}", sabotage.words()));
                }
                [first, ..] => say(&format!(
                    "red, as expected, after {seconds} s: {} (the program {})",
                    first.description(),
                    sabotage.words()
                )),
            }
            !found.is_empty()
        }
    };
    Ok((report, as_expected))
}
