//! The command line of `make bench`.

use std::path::PathBuf;

use anyhow::{Context, bail};

use crate::{
    Capture, Growth, Idle, Latency, Memory, Project, Read, Relay, Traces, Write,
    figure::{self, Figure, Measured},
    files,
    machine::machine,
    report::{Failed, Report},
    scale::Scale,
    testbed::Testbed,
};
use devstack::{say, show, shutdown::Shutdown};

/// The arguments of `bench`.
#[derive(Clone, Debug, clap::Args)]
pub struct BenchArgs {
    /// Run fewer and shorter rounds, to show that every figure can be measured. The numbers mean little, so no goal is
    /// checked, and docs/bench and docs/proof/bench.md are not written. A debug build may run it.
    #[arg(long)]
    pub quick: bool,
    /// Also write every round as JSON to this file.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Measure these figures alone. docs/bench and docs/proof/bench.md are not written.
    #[arg(long, value_name = "FIGURE", value_enum, value_delimiter = ',')]
    pub only: Vec<Name>,
    /// Write the report and its plots to this folder, for every kind of run, instead of to docs/bench.
    #[arg(long, value_name = "FOLDER")]
    pub docs: Option<PathBuf>,
}

/// A figure's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
#[expect(missing_docs, reason = "each figure documents itself")]
pub enum Name {
    Relay,
    Write,
    Capture,
    Read,
    Project,
    Latency,
    Growth,
    Traces,
    Idle,
}

/// Measures. Exit code 1: a goal is missed, or a figure could not be measured.
pub async fn run(args: &BenchArgs) -> anyhow::Result<u8> {
    // A debug build of the bench takes the debug programs next to it.
    if cfg!(debug_assertions) && !args.quick {
        bail!("this is a debug build, which is many times slower: run make bench");
    }
    let checkout = devstack::command::checkout()?;
    let shutdown = Shutdown::watch()?;
    let size = if args.quick { Scale::QUICK } else { Scale::FULL };
    let begin = std::time::Instant::now();
    let measured = async {
        let testbed = Testbed::start(size).await?;
        let report = Box::pin(all(&testbed, args)).await;
        testbed.stop().await;
        report
    };
    let Some(report) = shutdown.requested.run_until_cancelled(Box::pin(measured)).await else {
        bail!("the bench was interrupted");
    };
    let report = report?;
    say(&format!("measured in {} s", begin.elapsed().as_secs()));
    show(&format!("\n{}\n", report.page()));
    if let Some(path) = &args.json {
        std::fs::write(path, report.json()?).with_context(|| format!("cannot write {}", path.display()))?;
    }
    match &args.docs {
        Some(folder) => files::write(&report, folder)?,
        None if !args.quick && args.only.is_empty() && report.failed.is_empty() => {
            files::write(&report, &checkout.join("docs/bench"))?;
            let table = format!("{}\n{}\n", report.table(), report.measured_on());
            files::write_into("make bench", &table, &checkout.join("docs/proof/bench.md"))?;
            say("docs/bench and the table in docs/proof/bench.md are written");
        }
        None => {}
    }
    Ok(code(&report))
}

/// The exit code, and a line that says why it is not 0. A quick run checks no goal: its numbers mean too little.
fn code(report: &Report) -> u8 {
    let missed = if report.quick { Vec::new() } else { report.missed() };
    if !missed.is_empty() {
        say(&format!("goals missed: {}", missed.join("; ")));
    }
    for Failed { figure, error } in &report.failed {
        say(&format!("the figure {figure} could not be measured: {error}"));
    }
    u8::from(!missed.is_empty() || !report.failed.is_empty())
}

/// Every figure, in the order of the table.
async fn all(testbed: &Testbed, args: &BenchArgs) -> anyhow::Result<Report> {
    let mut run = Run { testbed, only: &args.only, results: Results::default() };
    run.figure::<Relay>(Name::Relay).await;
    run.figure::<Write>(Name::Write).await;
    run.figure::<Capture>(Name::Capture).await;
    run.figure::<Read>(Name::Read).await;
    run.figure::<Project>(Name::Project).await;
    run.figure::<Latency>(Name::Latency).await;
    run.figure::<Growth>(Name::Growth).await;
    run.figure::<Memory>(Name::Growth).await;
    run.figure::<Traces>(Name::Traces).await;
    run.figure::<Idle>(Name::Idle).await;
    let command = match (args.quick, args.only.is_empty()) {
        (false, true) => "make bench",
        (true, true) => "make bench BENCH_ARGS=--quick",
        (_, false) => "make bench BENCH_ARGS=\"--only …\"",
    };
    let machine = machine(testbed).await?;
    let Results { rows, notes, failed } = run.results;
    Ok(Report {
        command: command.to_owned(),
        quick: args.quick,
        size: testbed.size,
        machine,
        rows,
        notes,
        failed,
    })
}

struct Run<'a> {
    testbed: &'a Testbed,
    only: &'a [Name],
    results: Results,
}

/// The results of the figures so far.
#[derive(Default)]
struct Results {
    rows: Vec<Measured>,
    notes: Vec<String>,
    failed: Vec<Failed>,
}

impl Run<'_> {
    /// Measures a figure.
    async fn figure<F: Figure>(&mut self, name: Name) {
        if !self.only.is_empty() && !self.only.contains(&name) {
            return;
        }
        let title = F::ROWS.first().map_or("?", |row| row.name);
        say(&format!("{title}: preparing"));
        let measured = Box::pin(figure::measure::<F>(self.testbed, say)).await;
        self.results.add(title, measured);
    }
}

impl Results {
    /// Adds a figure. One that fails does not stop the others.
    fn add(&mut self, figure: &'static str, measured: anyhow::Result<(Vec<Measured>, Vec<String>)>) {
        match measured {
            Ok((rows, notes)) => {
                self.rows.extend(rows);
                self.notes.extend(notes);
            }
            Err(error) => {
                let error = format!("{error:#}");
                say(&format!("{figure} failed, and the other figures go on: {error}"));
                self.failed.push(Failed { figure, error });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{figure::Row, goal::Goal};

    #[test]
    fn a_figure_that_fails_leaves_the_others() {
        let row = Row { name: "read", system: "", ceiling: None, unit: "reads/s", goal: Goal::Below(9.0) };
        let read = Measured { row, of_system: vec![7.0], of_ceiling: Vec::new() };
        let mut results = Results::default();
        results.add("write", Err(anyhow::anyhow!("no such column").context("pgbench ended with 2")));
        results.add("read", Ok((vec![read], Vec::new())));
        let Results { rows, notes, failed } = results;
        let report = Report {
            command: "make bench".to_owned(),
            quick: true,
            size: Scale::QUICK,
            machine: Vec::new(),
            rows,
            notes,
            failed,
        };
        let page = report.page();
        assert!(page.contains("| read | 7.00 reads/s |"), "{page}");
        let said = "**The figure write could not be measured**: pgbench ended with 2: no such column";
        assert!(page.contains(said) && report.json().unwrap().contains("no such column"), "{page}");
        assert_eq!(code(&report), 1);
        assert_eq!(code(&Report { failed: Vec::new(), ..report }), 0);
    }
}
