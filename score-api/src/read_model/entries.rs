//! The entries of a score, page by page, with the score of the same snapshot.

use chrono::{DateTime, Utc};
use daemon::traces;
use rust_decimal::Decimal;
use sqlx::{FromRow, PgPool, Row, postgres::PgRow};
use uuid::Uuid;

use super::{Cpf, ReadError, Score, in_time};

/// How many entries a page has at most.
pub(crate) const MAX: i32 = 1000;

/// One statement, so one snapshot: the newest person by `person_cpf`, and its entries by `entry_person`, which
/// has them in their order, from where the page begins. One row of the person, and one more entry than the
/// page has, to know whether there are more.
const ENTRIES: &str =
    "SELECT person.*, entry.id AS entry, entry.type, entry.value, entry.score, entry.created_at
FROM (SELECT id, version, total, updated_at FROM score.person
      WHERE cpf = $1 ORDER BY created_at DESC, id DESC LIMIT 1) person
LEFT JOIN LATERAL (SELECT id, type, value, score, created_at FROM score.entry
                   WHERE person_id = person.id AND id > $2 ORDER BY id LIMIT $3) entry ON true
ORDER BY entry.id";

/// The page to read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Page {
    /// 1 to [`MAX`].
    pub(crate) limit: i32,
    /// The id of the entry before the page. None for the first page.
    pub(crate) after: Option<Uuid>,
}

/// A page of the entries of a score.
pub(crate) struct EntryPage {
    /// The score of all of them.
    pub(crate) score: Score,
    /// In the order of their ids, which is the order of creation.
    pub(crate) entries: Vec<Entry>,
    /// Whether there are more entries after these.
    pub(crate) more: bool,
}

/// What one item adds to a score.
pub(crate) struct Entry {
    /// The item's id.
    pub(crate) id: Uuid,
    /// `income`, `asset` or `debt`.
    pub(crate) type_: String,
    pub(crate) value: Decimal,
    pub(crate) score: i64,
    pub(crate) created_at: DateTime<Utc>,
}

impl FromRow<'_, PgRow> for Entry {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        Ok(Self {
            id: row.try_get("entry")?,
            type_: row.try_get("type")?,
            // As it was sent: 1000, not the column's 1000.0000.
            value: row.try_get::<Decimal, _>("value")?.normalize(),
            score: row.try_get("score")?,
            created_at: row.try_get("created_at")?,
        })
    }
}

/// Reads a page of the entries of the newest person with this cpf, if one is known.
pub(crate) async fn entries(pool: &PgPool, cpf: Cpf, page: Page) -> Result<Option<EntryPage>, ReadError> {
    let read = in_time(async {
        let first = page.after.unwrap_or_default();
        let rows = sqlx::query(ENTRIES).bind(cpf.0).bind(first).bind(page.limit + 1).fetch_all(pool).await?;
        let Some(row) = rows.first() else { return Ok(None) };
        let score = Score::from_row(row)?;
        // A person without entries has one row with nulls.
        let rows = if row.try_get::<Option<Uuid>, _>("entry")?.is_some() { &rows[..] } else { &[] };
        let limit = usize::try_from(page.limit).unwrap_or_default();
        let entries = rows.iter().take(limit).map(Entry::from_row).collect::<sqlx::Result<_>>()?;
        Ok(Some(EntryPage { score, entries, more: rows.len() > limit }))
    });
    traces::statement("SELECT", "entry", read, ReadError::class).await
}

#[cfg(test)]
mod tests {
    use sqlx::PgConnection;

    use super::*;
    use crate::read_model::{schemas, tests::connect};

    /// However many persons and entries there are, a page reads one row of a person and as many entries as
    /// it has, and one; also while the server knows nothing of the tables yet.
    #[tokio::test]
    async fn a_page_is_found_by_the_indexes_alone() {
        let url = devstack::testing::database("score_api_plan").await;
        let mut conn = connect(&url).await;
        for schema in schemas() {
            schema.migrator.run(&mut conn).await.unwrap();
        }
        let plan = async |conn: &mut PgConnection, options| -> String {
            let explain = sqlx::AssertSqlSafe(format!("EXPLAIN ({options}) {ENTRIES}"));
            let explain = sqlx::query_scalar(explain).bind(11111_i64).bind(Uuid::nil()).bind(101_i32);
            let plan: Vec<String> = explain.fetch_all(conn).await.unwrap();
            plan.join("\n")
        };
        let of_the_empty = plan(&mut conn, "COSTS OFF").await;
        insta::assert_snapshot!(of_the_empty, @r"
        Sort
          Sort Key: entry.id
          ->  Nested Loop Left Join
                ->  Limit
                      ->  Index Scan using person_cpf on person
                            Index Cond: (cpf = '11111'::bigint)
                ->  Limit
                      ->  Index Scan using entry_person on entry
                            Index Cond: ((person_id = person.id) AND (id > '00000000-0000-0000-0000-000000000000'::uuid))
        ");
        for fill in [
            "INSERT INTO score.person (id, cpf, created_at, version)
             SELECT gen_random_uuid(), i % 9000 + 9000, now() + i * interval '1 s', 1
             FROM generate_series(1, 18000) i",
            "INSERT INTO score.entry (id, person_id, type, value, score, created_at)
             SELECT gen_random_uuid(), id, 'asset', 20, 1, now()
             FROM score.person, generate_series(1, CASE WHEN cpf = 11111 THEN 10000 ELSE 2 END)",
            "ANALYZE score.person, score.entry",
        ] {
            sqlx::query(fill).execute(&mut conn).await.unwrap();
        }
        assert_eq!(plan(&mut conn, "COSTS OFF").await, of_the_empty);
        let done = plan(&mut conn, "ANALYZE, COSTS OFF, TIMING OFF, SUMMARY OFF").await;
        let read: Vec<_> = done.lines().filter(|line| line.contains("Index Scan")).map(str::trim).collect();
        // PostgreSQL 18 prints two decimals.
        insta::assert_snapshot!(read.join("\n").replace(".00 ", " "), @r"
        ->  Index Scan using person_cpf on person (actual rows=1 loops=1)
        ->  Index Scan using entry_person on entry (actual rows=101 loops=1)
        ");
    }
}
