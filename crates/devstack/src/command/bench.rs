//! `devstack bench`: measures the system next to its ceilings, and holds both against the goals.

use std::path::PathBuf;

use anyhow::{Context, bail};

use crate::{
    bench::{
        self, Growth, Idle, Latency, Memory, Project, Read, Relay, Write,
        figure::{self, Figure, Measured, Size},
        ground::Ground,
        report::{Report, machine},
    },
    ending::Ending,
    say, show,
};

/// What `bench` is told.
#[derive(Clone, Debug, clap::Args)]
pub struct BenchArgs {
    /// Fewer and shorter rounds, for trying it out: the numbers mean little, and docs/bench and README.md stay
    /// as they are.
    #[arg(long)]
    pub quick: bool,
    /// Also write every round of everything to this file.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Only these figures; docs/bench and README.md stay as they are.
    #[arg(long, value_name = "FIGURE", value_enum, value_delimiter = ',')]
    pub only: Vec<Name>,
    /// Write the report with its plots to this folder, whatever the run, instead of to docs/bench.
    #[arg(long, value_name = "FOLDER")]
    pub docs: Option<PathBuf>,
}

/// A figure's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
#[expect(missing_docs, reason = "each figure documents itself")]
pub enum Name {
    Relay,
    Write,
    Read,
    Project,
    Latency,
    Growth,
    Idle,
}

/// Measures. Exit code 1: a goal is missed.
pub async fn run(args: &BenchArgs) -> anyhow::Result<u8> {
    if cfg!(debug_assertions) {
        bail!("this is a debug build, which is many times slower: run make bench");
    }
    bench::refuses_sabotage().await?;
    let checkout = super::checkout()?;
    let ending = Ending::watch()?;
    let size = if args.quick { Size::QUICK } else { Size::FULL };
    let begin = std::time::Instant::now();
    let measured = async {
        let ground = Ground::start(size).await?;
        let report = Box::pin(all(&ground, args)).await;
        ground.stop().await;
        report
    };
    let Some(report) = ending.asked.run_until_cancelled(Box::pin(measured)).await else {
        bail!("the bench was ended");
    };
    let report = report?;
    say(&format!("measured in {} s", begin.elapsed().as_secs()));
    show(&format!("\n{}\n", report.page()));
    if let Some(path) = &args.json {
        std::fs::write(path, report.json()?).with_context(|| format!("cannot write {}", path.display()))?;
    }
    match &args.docs {
        Some(folder) => report.write(folder)?,
        None if !args.quick && args.only.is_empty() => {
            report.write(&checkout.join("docs/bench"))?;
            report.write_into(&checkout.join("README.md"))?;
            say("docs/bench and the table in README.md are new");
        }
        None => {}
    }
    match report.missed().as_slice() {
        [] => Ok(0),
        missed => {
            say(&format!("goals missed: {}", missed.join("; ")));
            Ok(1)
        }
    }
}

/// Every figure, in the order of the table.
async fn all(ground: &Ground, args: &BenchArgs) -> anyhow::Result<Report> {
    let mut run = Run { ground, only: &args.only, rows: Vec::new(), notes: Vec::new() };
    run.figure::<Relay>(Name::Relay).await?;
    run.figure::<Write>(Name::Write).await?;
    run.figure::<Read>(Name::Read).await?;
    run.figure::<Project>(Name::Project).await?;
    run.figure::<Latency>(Name::Latency).await?;
    run.figure::<Growth>(Name::Growth).await?;
    run.figure::<Memory>(Name::Growth).await?;
    run.figure::<Idle>(Name::Idle).await?;
    let command = match (args.quick, args.only.is_empty()) {
        (false, true) => "make bench",
        (true, true) => "make bench BENCH_ARGS=--quick",
        (_, false) => "devstack bench --only …",
    };
    let machine = machine(ground).await?;
    let Run { rows, notes, .. } = run;
    Ok(Report { command: command.to_owned(), quick: args.quick, size: ground.size, machine, rows, notes })
}

struct Run<'a> {
    ground: &'a Ground,
    only: &'a [Name],
    rows: Vec<Measured>,
    notes: Vec<String>,
}

impl Run<'_> {
    async fn figure<F: Figure>(&mut self, name: Name) -> anyhow::Result<()> {
        if !self.only.is_empty() && !self.only.contains(&name) {
            return Ok(());
        }
        let title = F::ROWS.first().map_or("?", |row| row.name);
        say(&format!("{title}: preparing"));
        let measured = Box::pin(figure::measure::<F>(self.ground, say)).await;
        let (rows, notes) = measured.with_context(|| format!("the figure {title} could not be measured"))?;
        self.rows.extend(rows);
        self.notes.extend(notes);
        Ok(())
    }
}
