//! What `doctor` asks of settings that come from outside: of the database, of roles and of what lies between.

use daemon::config::database::Sessions;
use outbox::database::SharedSessions;
use sqlx::PgConnection;

use super::Check;

/// Connecting fails where a pooler shares sessions, so that nothing is asked of another client's session. This compares
/// two connections that are open at the same time once more.
pub(super) async fn session(
    conn: &mut PgConnection,
    second: &mut PgConnection,
) -> Result<Check, sqlx::Error> {
    match Sessions::of(conn, second).await? {
        Sessions::Own => Ok(Check::ok(
            "session",
            "each connection has a session of its own, so there is no pooler between",
        )),
        Sessions::Shared => Err(SharedSessions.into()),
    }
}

/// Defaults that no program may set aside, because an operator who sets them means them.
pub(super) async fn writes(conn: &mut PgConnection) -> Result<Check, sqlx::Error> {
    // This role's own, by whatever way; and every other role's, for this database or for all.
    let sql = "SELECT CASE WHEN setrole = 0 THEN 'the database' ELSE 'the role ' || setrole::regrole END
               FROM pg_db_role_setting CROSS JOIN LATERAL unnest(setconfig) AS setting
               WHERE setting ~* '^default_transaction_read_only=(on|true|yes|1)$'
                 AND setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
               UNION
               SELECT 'the role ' || current_user
               WHERE current_setting('default_transaction_read_only') = 'on' AND NOT pg_is_in_recovery()
               ORDER BY 1";
    let read_only: Vec<String> = sqlx::query_scalar(sql).fetch_all(conn).await?;
    if read_only.is_empty() {
        return Ok(Check::ok(
            "writes",
            "default_transaction_read_only is off for the database and every role",
        ));
    }
    Ok(Check::problem(
        "writes",
        format!("default_transaction_read_only is on for {}", read_only.join(", ")),
        "a relay or a writer under it can write nothing; set it off with ALTER ROLE or ALTER DATABASE",
    ))
}

/// `pg_dump` carries the rights on functions and none on the database. So where the advisory locks were taken from
/// PUBLIC and CONNECT was not, as roles.sql does both, the database was restored and lost what closed it. Where both are
/// PUBLIC's, nobody has closed the database, which is PostgreSQL's default and no finding.
pub(super) async fn connect(conn: &mut PgConnection) -> Result<Check, sqlx::Error> {
    let name = "connect";
    let sql = "SELECT quote_ident(d.datname),
                      EXISTS (SELECT FROM aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a
                              WHERE a.grantee = 0 AND a.privilege_type = 'CONNECT'),
                      EXISTS (SELECT FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
                              WHERE a.grantee = 0)
               FROM pg_database d, pg_proc p
               WHERE d.datname = current_database()
                 AND p.oid = 'pg_catalog.pg_advisory_lock(bigint)'::regprocedure";
    let (database, may_connect, may_lock): (String, bool, bool) = sqlx::query_as(sql).fetch_one(conn).await?;
    Ok(match (may_connect, may_lock) {
        (false, _) => Check::ok(name, "only roles that were granted it may connect to this database"),
        (true, true) => Check::ok(
            name,
            "every role of the server may connect to this database, as by PostgreSQL's default",
        ),
        (true, false) => Check::warning(
            name,
            "every role of the server may connect to this database, although its advisory locks were taken from \
             PUBLIC: a restore with pg_restore loses the rights on the database",
            format!(
                "let a superuser run deploy/permissions/roles.sql in it again, or grant CONNECT to each program's role \
                 and run: REVOKE CONNECT, TEMPORARY ON DATABASE {database} FROM PUBLIC"
            ),
        ),
    })
}

/// Rows that a role does not see are events that are never published.
pub(super) async fn row_security(conn: &mut PgConnection) -> Result<Check, sqlx::Error> {
    let sql = "SELECT relname::text FROM pg_class
               WHERE relnamespace = 'outbox'::regnamespace AND relrowsecurity ORDER BY 1";
    let tables: Vec<String> = sqlx::query_scalar(sql).fetch_all(&mut *conn).await?;
    let Some(first) = tables.first() else {
        return Ok(Check::ok("row security", "off for every table of the schema"));
    };
    // This role, and every one that has the rights of a relay. What owns a table is subject where that is forced.
    let sql = "SELECT EXISTS (
                   SELECT FROM pg_class c CROSS JOIN pg_roles r
                   WHERE c.relnamespace = 'outbox'::regnamespace AND c.relrowsecurity
                     AND NOT r.rolsuper AND NOT r.rolbypassrls
                     AND (r.rolname = current_user
                          OR r.rolcanlogin AND has_table_privilege(r.oid, 'outbox.relay', 'UPDATE'))
                     AND (c.relforcerowsecurity OR NOT pg_has_role(r.oid, c.relowner, 'USAGE')))";
    let subject: bool = sqlx::query_scalar(sql).fetch_one(conn).await?;
    let on = format!("on for {}", tables.join(", "));
    if !subject {
        return Ok(Check::ok("row security", format!("{on}, to which no relay's role is subject")));
    }
    Ok(Check::problem(
        "row security",
        format!("{on}: a relay that is subject to it publishes nothing"),
        format!(
            "run: ALTER TABLE outbox.{first} DISABLE ROW LEVEL SECURITY, or give the relay's role BYPASSRLS"
        ),
    ))
}

/// A partition whose end is unknown keeps the next one from being made.
pub(super) async fn bounds(conn: &mut PgConnection) -> Result<Check, sqlx::Error> {
    let sql = "SELECT p.name FROM outbox.partition p JOIN pg_class c ON c.relname = p.name
               WHERE c.relnamespace = 'outbox'::regnamespace AND NOT p.is_default AND p.upper IS NULL
                 AND strpos(pg_get_expr(c.relpartbound, c.oid), 'TO (MAXVALUE)') = 0
               ORDER BY 1 LIMIT 1";
    let unknown: Option<String> = sqlx::query_scalar(sql).fetch_optional(conn).await?;
    Ok(match unknown {
        None => Check::ok("partition bounds", "known"),
        Some(name) => Check::problem(
            "partition bounds",
            format!("the end of {name} is unknown, so no partition is made after it"),
            "run: outbox-relay migrate --source NAME",
        ),
    })
}
