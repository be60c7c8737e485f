//! What PostgreSQL does by itself: pgbench, which comes with it, with a program's own statement.

use std::{fs, time::Duration};

use anyhow::{Context, ensure};
use sqlx::PgConnection;

use super::testbed::Testbed;

/// The statement with `text` in it that a program has sent last, as the server got it: so that pgbench
/// repeats what the program does, and not what somebody once copied from it.
pub(crate) async fn statement(conn: &mut PgConnection, program: &str, text: &str) -> anyhow::Result<String> {
    sqlx::query_scalar(
        "SELECT query FROM pg_stat_activity
         WHERE application_name = $1 AND strpos(query, $2) > 0 ORDER BY query_start DESC LIMIT 1",
    )
    .bind(program)
    .bind(text)
    .fetch_optional(conn)
    .await?
    .with_context(|| format!("{program} has sent no statement with {text:?} in it"))
}

/// Statements a second of a script, prepared, by so many clients.
pub(crate) async fn run(
    testbed: &Testbed,
    [role, database]: [&str; 2],
    script: &str,
    clients: u32,
    length: Duration,
) -> anyhow::Result<f64> {
    let (folder, postgres) = (testbed.stack.folder(), &testbed.stack.servers.postgres);
    let home = folder.part("pgbench")?;
    let file = home.join("script.sql");
    fs::write(&file, script)?;
    let log = folder.log("pgbench")?;
    let port = postgres.port();
    let seconds = length.as_secs().max(1);
    postgres
        .client("pgbench", log.clone())
        .env("PGPASSWORD", &folder.secrets().postgres)
        .args(["--no-vacuum", "--protocol=prepared", "--jobs=2", "--host=127.0.0.1"])
        .args([format!("--client={clients}"), format!("--time={seconds}"), format!("--username={role}")])
        .args([format!("--port={port}"), format!("--file={}", file.display()), database.to_owned()])
        .run()
        .await?;
    // tps = 8123.456789 (without initial connection time)
    let text = fs::read_to_string(log.path())?;
    let tps = text.lines().find_map(|line| line.strip_prefix("tps = ")?.split(' ').next());
    tps.and_then(|tps| tps.parse().ok()).with_context(|| format!("pgbench says no tps: {text}"))
}

/// A statement with its `$1`, `$2`, … named, each of them: pgbench numbers what it finds itself.
pub(crate) fn named(statement: &str, names: &[&str]) -> anyhow::Result<String> {
    let mut parts = statement.split('$');
    let mut sql = parts.next().unwrap_or_default().to_owned();
    let mut used = vec![false; names.len()];
    for part in parts {
        let digits = part.bytes().take_while(u8::is_ascii_digit).count();
        let (number, rest) = part.split_at(digits);
        let at = number.parse::<usize>().ok().and_then(|number| number.checked_sub(1));
        let (at, name) = at.and_then(|at| Some((at, names.get(at)?))).with_context(|| {
            format!(
                "${number} has no name; {} parameters are named of this statement: {statement}",
                names.len()
            )
        })?;
        used[at] = true;
        sql.extend([name, rest]);
    }
    let unused: Vec<_> = names.iter().zip(used).filter_map(|(name, used)| (!used).then_some(*name)).collect();
    ensure!(unused.is_empty(), "nothing is called {} in this statement: {statement}", unused.join(", "));
    Ok(sql)
}

#[cfg(test)]
mod tests {
    #[test]
    fn parameters_have_names() {
        let named = |statement| super::named(statement, &[":a", ":b::text"]);
        assert_eq!(named("VALUES ($2, $1, $2)").unwrap(), "VALUES (:b::text, :a, :b::text)");
        for wrong in ["VALUES ($1, $2, $3)", "VALUES ($1)", "VALUES ($1, $2, $0)", "SELECT $$a$$, $1, $2"] {
            named(wrong).unwrap_err();
        }
    }

    /// `$10` is no `$1` with a zero behind it.
    #[test]
    fn the_tenth_parameter_is_not_the_first() {
        let names = [":a", ":b", ":c", ":d", ":e", ":f", ":g", ":h", ":i", ":j", ":k"];
        let sql = "SELECT $11, $1::bigint, $2, $3, $4, $5, $6, $7, $8, $9, $10::bigint[]";
        let text = super::named(sql, &names).unwrap();
        assert_eq!(text, "SELECT :k, :a::bigint, :b, :c, :d, :e, :f, :g, :h, :i, :j::bigint[]");
        super::named(sql, &names[..9]).unwrap_err();
    }
}
