//! The programs' roles, as `deploy/permissions/roles.sql` makes them: with what each needs and no more.

use anyhow::Context;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};

/// What an operator runs in each database.
const SCRIPT: &str = include_str!("../../../deploy/permissions/roles.sql");

/// Those that have one, and `writer` for any other service that appends events.
pub const PROGRAMS: [&str; 5] = ["person_api", "score_projector", "score_api", "outbox_relay", "writer"];

/// Runs the script in a database whose schemas are there, as a superuser, and gives the roles it is about this
/// password. `names` are the roles of those programs that are not called like their program: roles belong
/// to the whole server, and stacks may share one. The password is of our making and may have no quotation marks.
pub async fn make(conn: &mut PgConnection, names: &[(&str, &str)], password: &str) -> anyhow::Result<()> {
    let mut tx = conn.begin().await?;
    for (program, role) in names {
        let set = sqlx::query("SELECT set_config($1, $2, true)").bind(format!("roles.{program}"));
        set.bind(role).execute(&mut *tx).await?;
    }
    tx.execute(SCRIPT).await.context("the roles cannot be made")?;
    let role = |program| names.iter().find(|(of, _)| *of == program).map_or(program, |(_, role)| *role);
    let made: Vec<String> = sqlx::query_scalar("SELECT rolname::text FROM pg_roles WHERE rolname = ANY ($1)")
        .bind(PROGRAMS.map(role))
        .fetch_all(&mut *tx)
        .await?;
    for role in made {
        tx.execute(AssertSqlSafe(format!("ALTER ROLE {role} PASSWORD '{password}'"))).await?;
    }
    tx.commit().await?;
    Ok(())
}
