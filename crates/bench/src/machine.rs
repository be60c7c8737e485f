//! What a run is measured on.

use std::{fs, path::Path};

use devstack::{binary, program::client};
use serde_json::Value;

use super::testbed::Testbed;

/// Versions, settings and hardware, for the report.
pub(crate) async fn machine(testbed: &Testbed) -> anyhow::Result<Vec<(&'static str, String)>> {
    let mut conn = testbed.connect("postgres").await?;
    let setting =
        |name: &'static str| sqlx::query_scalar::<_, String>("SELECT current_setting($1)").bind(name);
    let postgres = setting("server_version").fetch_one(&mut conn).await?;
    let mut settings = Vec::new();
    for name in
        ["fsync", "synchronous_commit", "full_page_writes", "wal_level", "shared_buffers", "max_wal_size"]
    {
        settings.push(format!("{name} {}", setting(name).fetch_one(&mut conn).await?));
    }
    let overview = format!("{}/api/overview", testbed.stack.servers.rabbitmq.management_url());
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
    // Cargo's folder has the name of the profile.
    let program = binary::find("person-api")?;
    let build = program.parent().and_then(Path::file_name).unwrap_or_default().display();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kib: u64 = field(&read("/proc/meminfo"), "MemTotal").trim_end_matches(" kB").parse().unwrap_or(0);
    Ok(vec![
        ("cores", format!("{cores}, {}", field(&read("/proc/cpuinfo"), "model name"))),
        ("memory", format!("{} GiB", kib.div_ceil(1024 * 1024))),
        ("kernel", read("/proc/sys/kernel/osrelease").trim().to_owned()),
        ("PostgreSQL", format!("{postgres}; {}", settings.join(", "))),
        ("RabbitMQ", format!("{} on Erlang {}; one node", of("rabbitmq_version"), of("erlang_version"))),
        ("messages", "persistent, mandatory, confirmed, into a quorum queue".to_owned()),
        ("load before", testbed.load.clone()),
        ("programs", format!("{}, {build} build, settings as they are built in", env!("CARGO_PKG_VERSION"))),
    ])
}
