//! The outbox's migrations as one SQL script, for a team whose own tool changes its databases.

use std::fmt::Write;

use sqlx::migrate::Migration;

/// What a script is for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Script<'a> {
    /// The name under which the database publishes.
    pub(super) source: &'a str,
    /// The migrations up to this one are there; 0 when none is.
    pub(super) after: i64,
    /// The roles that append events, and those that relay.
    pub(super) writers: &'a [String],
    pub(super) relays: &'a [String],
}

/// What the migrations set or rely on. The statements of a migration tool may follow in the same transaction, so each has
/// its value again at the end.
const SETTINGS: [&str; 3] = ["search_path", "lock_timeout", "standard_conforming_strings"];

/// Says which indexes are missing, and how they are made.
const INDEXES: &str = "
-- A table that was large already may lack an index. It is made beside writers, which a transaction cannot do. A warning
-- names each one. After the commit, run in psql: SELECT statement FROM outbox.missing_index \\gexec
-- Or run `outbox-relay migrate`. Until then everything works.
DO $outbox$
DECLARE
    missing record;
BEGIN
    FOR missing IN SELECT m.statement FROM outbox.missing_index m ORDER BY m.upper, m.name, m.step LOOP
        RAISE WARNING 'an index of the outbox is missing'
            USING HINT = format('Run outside of a transaction: %s', missing.statement);
    END LOOP;
END
$outbox$;
";

impl Script<'_> {
    /// SQL that makes of these migrations what is missing, and records each as `outbox-relay migrate` does.
    pub(super) fn text(self, migrations: &[Migration]) -> String {
        let Self { source, after, writers, relays } = self;
        let versions = || migrations.iter().map(|migration| migration.version);
        let last = versions().max().unwrap_or_default();
        // Numbers may be left out, and the record has none of those.
        let before = versions().filter(|version| *version <= after).max().unwrap_or_default();
        let release = env!("CARGO_PKG_VERSION");
        let mut text = format!(
            "-- The schema \"outbox\" of outbox-relay {release}: the migrations after {before}, up to {last}.\n\
             --\n\
             -- Run it in one transaction, as the role that is to own the schema, for example with\n\
             -- psql -1 -v ON_ERROR_STOP=1 -f FILE. Afterwards `outbox-relay migrate` has nothing to do. A later release:\n\
             -- outbox-relay migrate --print --source {source} --after {last}\n\n\
             DO $outbox$\n\
             BEGIN\n    \
             IF current_setting('server_encoding') <> 'UTF8' THEN\n        \
             RAISE EXCEPTION 'the outbox needs a database with the encoding UTF8, and this one has %',\n            \
             current_setting('server_encoding');\n    \
             END IF;\n"
        );
        text += &guard(before);
        for setting in SETTINGS {
            let _never = writeln!(
                text,
                "    PERFORM set_config('outbox_script.{setting}', current_setting('{setting}'), true);"
            );
        }
        text += "    PERFORM set_config('search_path', 'pg_catalog, pg_temp', true);\n    \
                 PERFORM set_config('standard_conforming_strings', 'on', true);\n\
                 END\n\
                 $outbox$;\n";
        if before == 0 {
            text += "\nCREATE SCHEMA IF NOT EXISTS outbox;\n\
                     CREATE TABLE IF NOT EXISTS outbox.migration (\n    \
                     version        bigint      PRIMARY KEY,\n    \
                     description    text        NOT NULL,\n    \
                     installed_on   timestamptz NOT NULL DEFAULT now(),\n    \
                     success        boolean     NOT NULL,\n    \
                     checksum       bytea       NOT NULL,\n    \
                     execution_time bigint      NOT NULL\n\
                     );\n";
        }
        for migration in migrations.iter().filter(|migration| migration.version > before) {
            text += &one(migration);
        }
        let _never = write!(
            text,
            "\n\n-- The source, and who may write and relay.\n\
             INSERT INTO outbox.source (name, server) VALUES ('{source}', outbox.server()) ON CONFLICT DO NOTHING;\n\
             DO $outbox$\n\
             BEGIN\n    \
             IF NOT EXISTS (SELECT FROM outbox.source WHERE name = '{source}') THEN\n        \
             RAISE EXCEPTION 'this database already publishes under another name than {source}';\n    \
             END IF;\n\
             END\n\
             $outbox$;\n"
        );
        for (function, roles) in [("grant_writer", writers), ("grant_relay", relays)] {
            for role in roles {
                let role = role.replace('\'', "''");
                let _never = writeln!(text, "SELECT outbox.{function}('{role}'::regrole);");
            }
        }
        text += "\n-- Back to what the transaction had before.\nDO $outbox$\nBEGIN\n";
        for setting in SETTINGS {
            let _never = writeln!(
                text,
                "    PERFORM set_config('{setting}', current_setting('outbox_script.{setting}'), true);"
            );
        }
        text += "END\n$outbox$;\n";
        if before > 0 {
            text += INDEXES;
        }
        text
    }
}

/// Ends the script where it does not fit.
fn guard(before: i64) -> String {
    if before == 0 {
        return "    IF to_regclass('outbox.migration') IS NOT NULL THEN\n        \
                RAISE EXCEPTION 'this database has an outbox already'\n            \
                USING HINT = 'Its newest migration is max(version) of outbox.migration. Print the script with --after and \
                that number.';\n    \
                END IF;\n"
            .to_owned();
    }
    format!(
        "    IF (SELECT max(version) FROM outbox.migration) IS DISTINCT FROM {before} THEN\n        \
         RAISE EXCEPTION 'the newest migration of this outbox is %, and this script follows {before}',\n            \
         (SELECT max(version) FROM outbox.migration)\n            \
         USING HINT = 'Print the script with --after and the number of the newest migration.';\n    \
         END IF;\n"
    )
}

/// A migration and its record. The checksum is that of the file, by which `migrate` and `run` know it.
fn one(migration: &Migration) -> String {
    let Migration { version, description, checksum, .. } = migration;
    let description = description.replace('\'', "''");
    let checksum = checksum.iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"));
    format!(
        "\n\n-- Migration {version}: {description}\n\n{sql}\n\
         INSERT INTO outbox.migration (version, description, success, checksum, execution_time)\n\
         VALUES ({version}, '{description}', true, decode('{checksum}', 'hex'), 0);\n",
        sql = migration.sql.as_str().trim_end(),
    )
}
