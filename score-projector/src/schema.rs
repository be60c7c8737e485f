//! The schemas in the score database: their migrations, and what a running program needs to find.

use daemon::config::database::{Needs, Schema};
use sqlx::migrate::Migrator;

/// The schema that holds the read model.
pub const SCHEMA: &str = "score";

/// The read model's migrations. They are recorded in `score.migration`, so the schema can share a database with others.
pub fn migrator() -> Migrator {
    let mut migrator = sqlx::migrate!("../migrations/score");
    migrator.dangerous_set_table_name("score.migration");
    migrator.create_schema(SCHEMA);
    migrator
}

/// What `run` needs of its database.
pub fn needs() -> Needs {
    const RIGHTS: &[(&str, &str)] = &[
        ("score.person", "SELECT"),
        ("score.person", "INSERT"),
        ("score.person", "UPDATE"),
        ("score.person", "DELETE"),
        ("score.entry", "SELECT"),
        ("score.entry", "INSERT"),
        ("score.entry", "UPDATE"),
        ("score.entry", "DELETE"),
        ("score.model", "SELECT"),
        ("inbox.aggregate", "SELECT"),
        ("inbox.aggregate", "INSERT"),
        ("inbox.aggregate", "UPDATE"),
        ("inbox.source", "SELECT"),
        ("inbox.source", "INSERT"),
        ("inbox.source", "UPDATE"),
        ("inbox.held", "SELECT"),
        ("inbox.held", "INSERT"),
        ("inbox.held", "DELETE"),
        ("inbox.rejected", "INSERT"),
        ("outbox.aggregate", "SELECT"),
        ("outbox.event", "INSERT"),
    ];
    Needs { schemas: needed().into(), writes: true, rights: RIGHTS }
}

/// The schemas that must be current before the program consumes: the read model, the inbox and the outbox.
pub fn needed() -> [Schema; 3] {
    const COMMAND: &str = "score-projector migrate";
    [
        Schema { name: SCHEMA, migrator: migrator(), command: COMMAND },
        Schema { name: inbox::SCHEMA, migrator: inbox::migrator(), command: COMMAND },
        Schema {
            name: outbox::SCHEMA,
            migrator: outbox::migrator(),
            command: "outbox-relay migrate --source score",
        },
    ]
}
