//! A run for people and for programs: the table, the plots, and what they were measured on.

use std::{fmt::Write, fs, path::Path};

use anyhow::Context;
use serde::Serialize;
use serde_json::Value;

use super::{
    figure::{Goal, Measured, Size, Spread, number},
    ground::Ground,
    plot,
};
use devstack::program::client;

/// Everything that was found.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The command that measures it again.
    pub command: String,
    /// A short run, whose numbers mean little.
    pub quick: bool,
    /// How much was done.
    pub size: Size,
    /// Versions, cores, settings.
    pub machine: Vec<(&'static str, String)>,
    /// The rows of the table.
    pub rows: Vec<Measured>,
    /// What else is worth knowing.
    pub notes: Vec<String>,
    /// The figures without a result.
    pub failed: Vec<Failed>,
}

/// A figure that could not be measured.
#[derive(Clone, Debug, Serialize)]
pub struct Failed {
    /// Its name.
    pub figure: &'static str,
    /// Why.
    pub error: String,
}

impl Report {
    /// The rows whose goal is missed.
    pub fn missed(&self) -> Vec<&'static str> {
        self.rows.iter().filter(|row| !row.is_met()).map(|row| row.row.name).collect()
    }

    /// The table, in Markdown.
    pub fn table(&self) -> String {
        let mut text = "| figure | the system | its ceiling | in each round (least to most) | goal | |\n\
                        |---|---|---|---|---|---|\n"
            .to_owned();
        for measured in &self.rows {
            let row = measured.row;
            let median = |values: &[f64]| format!("{} {}", number(Spread::of(values).median), row.unit);
            let ceiling = if row.ceiling.is_some() { median(&measured.of_ceiling) } else { "–".to_owned() };
            let Spread { median: middle, min, max } = Spread::of(&measured.values());
            let _never = writeln!(
                text,
                "| {} | {} | {ceiling} | **{}** ({} to {}) | {} | {} |",
                row.name,
                median(&measured.of_system),
                number(middle),
                number(min),
                number(max),
                goal(row.goal),
                if measured.is_met() { "met" } else { "missed" },
            );
        }
        text
    }

    /// The whole page, in Markdown.
    pub fn page(&self) -> String {
        let mut text = format!("Made by `{}`.\n\n", self.command);
        if self.quick {
            text.push_str("**A quick run, to see that everything works: too short to mean much.**\n\n");
        }
        text.push_str(&self.table());
        for Failed { figure, error } in &self.failed {
            let _never = writeln!(text, "\n**The figure {figure} could not be measured**: {error}");
        }
        text.push_str(
            "\nEach number is the median of its rounds. A round is the system and then its ceiling, or the \
             other way round, on the same servers; what is held against the goal is computed in each round, \
             and the median decides.\n\n",
        );
        for Measured { row, .. } in &self.rows {
            let against = row.ceiling.map(|ceiling| format!(" Its ceiling: {ceiling}.")).unwrap_or_default();
            let _never = writeln!(text, "- **{}**: {}.{against}", row.name, row.system);
        }
        text.push('\n');
        for note in &self.notes {
            let _never = writeln!(text, "- {note}.");
        }
        text.push_str("\n| measured on | |\n|---|---|\n");
        for (name, value) in &self.machine {
            let _never = writeln!(text, "| {name} | {value} |");
        }
        text
    }

    /// Writes the page, the plots and the numbers into a folder.
    pub fn write(&self, folder: &Path) -> anyhow::Result<()> {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let files = [
            (
                "RESULTS.md",
                format!(
                    "# What `make bench` measured\n\n{}\n![goals](goals.svg)\n\n![rounds](rounds.svg)\n",
                    self.page()
                ),
            ),
            ("results.json", self.json()?),
            ("goals.svg", plot::goals(self)),
            ("rounds.svg", plot::rounds(self)),
        ];
        for (name, text) in files {
            let path = folder.join(name);
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }

    /// Puts the table where a page has the two marks for it.
    pub fn write_into(&self, page: &Path) -> anyhow::Result<()> {
        let text = fs::read_to_string(page).with_context(|| format!("cannot read {}", page.display()))?;
        let text = between(&text, &format!("{}\n{}\n", self.table(), self.measured_on()));
        let text = text.with_context(|| format!("{} has not the lines {BEGIN} and {END}", page.display()))?;
        fs::write(page, text).with_context(|| format!("cannot write {}", page.display()))
    }

    /// In a sentence.
    fn measured_on(&self) -> String {
        let of = |name: &str| {
            let found = self.machine.iter().find(|(field, _)| *field == name);
            found.map_or("?", |(_, value)| value.split(';').next().unwrap_or_default())
        };
        format!(
            "Medians of {} rounds, made by `{}` on {} cores, with PostgreSQL {} and RabbitMQ {}, both durable.",
            self.size.rounds,
            self.command,
            of("cores"),
            of("PostgreSQL"),
            of("RabbitMQ"),
        )
    }

    /// For programs: every round of everything.
    pub fn json(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }
}

/// The lines of a page between which the table is.
const BEGIN: &str = "<!-- make bench -->";
const END: &str = "<!-- /make bench -->";

/// A page with something new between its marks.
fn between(page: &str, new: &str) -> Option<String> {
    let (before, rest) = page.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n{new}{END}{after}"))
}

/// A goal in words.
pub(crate) fn goal(goal: Goal) -> String {
    match goal {
        Goal::RatioAtLeast(ratio) => format!("≥ {ratio} of it"),
        Goal::RatioAtMost(ratio) => format!("≤ {ratio} times it"),
        Goal::DifferenceAtMost(more) => format!("≤ {more} more"),
        Goal::Below(limit) => format!("< {limit}"),
    }
}

/// What it is measured on.
pub async fn machine(ground: &Ground) -> anyhow::Result<Vec<(&'static str, String)>> {
    let mut conn = ground.connect("postgres").await?;
    let setting =
        |name: &'static str| sqlx::query_scalar::<_, String>("SELECT current_setting($1)").bind(name);
    let postgres = setting("server_version").fetch_one(&mut conn).await?;
    let mut settings = Vec::new();
    for name in
        ["fsync", "synchronous_commit", "full_page_writes", "wal_level", "shared_buffers", "max_wal_size"]
    {
        settings.push(format!("{name} {}", setting(name).fetch_one(&mut conn).await?));
    }
    let overview = format!("{}/api/overview", ground.stack.servers.rabbitmq.management_url());
    let overview: Value = client()?.get(overview).send().await?.json().await?;
    let of = |name: &str| overview[name].as_str().unwrap_or("?").to_owned();
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.split_once(':'))
            .map(|(_, v)| v.trim().to_owned());
        line.unwrap_or_else(|| "?".to_owned())
    };
    let build = if cfg!(debug_assertions) { "debug" } else { "release" };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kib: u64 = field(&read("/proc/meminfo"), "MemTotal").trim_end_matches(" kB").parse().unwrap_or(0);
    Ok(vec![
        ("cores", format!("{cores}, {}", field(&read("/proc/cpuinfo"), "model name"))),
        ("memory", format!("{} GiB", kib.div_ceil(1024 * 1024))),
        ("kernel", read("/proc/sys/kernel/osrelease").trim().to_owned()),
        ("PostgreSQL", format!("{postgres}; {}", settings.join(", "))),
        ("RabbitMQ", format!("{} on Erlang {}; one node", of("rabbitmq_version"), of("erlang_version"))),
        ("messages", "persistent, mandatory, confirmed, into a quorum queue".to_owned()),
        ("load before", ground.load.clone()),
        ("programs", format!("{}, {build} build, settings as they are built in", env!("CARGO_PKG_VERSION"))),
    ])
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_is_between_the_marks_is_replaced() {
        let page = "a\n<!-- make bench -->\nold\n<!-- /make bench -->\nz\n";
        let new = super::between(page, "new\n").unwrap();
        assert_eq!(new, "a\n<!-- make bench -->\nnew\n<!-- /make bench -->\nz\n");
        assert_eq!(super::between("no marks", "new"), None);
    }
}
