use sqlx::migrate::Migrator;

/// The schema of all the inbox's tables and functions.
pub const SCHEMA: &str = "inbox";

/// The inbox's migrations. They are recorded in `inbox.migration`, so the inbox can be added to a database with other
/// migrations.
///
/// ```
/// # async fn example(pool: sqlx::PgPool) -> Result<(), sqlx::migrate::MigrateError> {
/// inbox::migrator().run(&pool).await?;
/// # Ok(())
/// # }
/// ```
pub fn migrator() -> Migrator {
    let mut migrator = sqlx::migrate!("./migrations");
    migrator.dangerous_set_table_name("inbox.migration");
    migrator.create_schema(SCHEMA);
    migrator
}

/// Begins a transaction as the inbox's statements rely on it, whatever the defaults of the database or the role are:
/// under another isolation, what another consumer has just committed would be a failure instead of a duplicate.
pub(crate) const BEGIN: &str = "BEGIN ISOLATION LEVEL READ COMMITTED";
