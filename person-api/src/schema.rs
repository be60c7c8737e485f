//! The schema `person`: its migrations, and what a running program needs to find.

use daemon::config::database::{Needs, Schema};
use sqlx::migrate::Migrator;

/// The schema that holds everything of the person service.
pub const SCHEMA: &str = "person";

/// The person service's migrations. Their record is kept in `person.migration`, so that the schema can
/// share a database with others.
pub fn migrator() -> Migrator {
    let mut migrator = sqlx::migrate!("../migrations/person");
    migrator.dangerous_set_table_name("person.migration");
    migrator.create_schema(SCHEMA);
    migrator
}

/// What `run` needs of its database.
pub fn needs() -> Needs {
    const RIGHTS: &[(&str, &str)] = &[
        ("person.person", "SELECT"),
        ("person.person", "INSERT"),
        ("person.person", "UPDATE"),
        ("person.person", "DELETE"),
        ("person.income", "SELECT"),
        ("person.income", "INSERT"),
        ("person.income", "UPDATE"),
        ("person.income", "DELETE"),
        ("person.asset", "SELECT"),
        ("person.asset", "INSERT"),
        ("person.asset", "UPDATE"),
        ("person.asset", "DELETE"),
        ("person.debt", "SELECT"),
        ("person.debt", "INSERT"),
        ("person.debt", "UPDATE"),
        ("person.debt", "DELETE"),
        ("person.idempotency", "SELECT"),
        ("person.idempotency", "INSERT"),
        ("person.idempotency", "DELETE"),
        ("outbox.event", "INSERT"),
        ("outbox.event", "SELECT"),
    ];
    Needs { schemas: needed().into(), writes: true, rights: RIGHTS }
}

/// What has to be current before the program takes requests: its own schema and the outbox.
pub fn needed() -> [Schema; 2] {
    [
        Schema { name: SCHEMA, migrator: migrator(), command: "person-api migrate" },
        Schema {
            name: outbox::SCHEMA,
            migrator: outbox::migrator(),
            command: "outbox-relay migrate --source person",
        },
    ]
}
