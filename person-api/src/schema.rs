//! The schema `person`: its migrations, and what a running program needs to find.

use service::config::database::Schema;
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
