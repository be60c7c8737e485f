//! Events in the shape in which person-api writes them, as many as needed, made by the server.

use chrono::{DateTime, Utc};
use lapin::{
    BasicProperties,
    types::{AMQPValue, FieldTable, ShortString},
};
use sqlx::{AssertSqlSafe, Executor, PgConnection};
use uuid::Uuid;

use super::statistics::float;
use devstack::rabbitmq;

/// How many events each person has: the person and four items.
pub(crate) const EVENTS_PER_PERSON: i64 = 5;

/// `count` events: first the new persons, a fifth of them, then items of all persons in turn. Every `batch` has persons of
/// its own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EventBatch {
    pub(crate) batch: i64,
    pub(crate) count: i64,
}

/// Whether events have a trace, each one of its own.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) enum Traced {
    #[default]
    No,
    Unsampled,
    Sampled,
}

impl Traced {
    /// The headers of an event as an expression.
    fn headers(self) -> String {
        let flags = match self {
            Self::No => return "NULL".to_owned(),
            Self::Unsampled => "00",
            Self::Sampled => "01",
        };
        format!(
            "jsonb_build_object('traceparent', '00-' || md5('t' || aggregate_id || version) || '-' ||
                 left(md5(aggregate_id || version), 16) || '-{flags}')"
        )
    }
}

impl EventBatch {
    /// How many persons they are about.
    pub(crate) fn persons(self) -> i64 {
        self.count / EVENTS_PER_PERSON
    }

    /// The events as a query: aggregate, version, type and body, in order. Ids are UUIDs that begin with a
    /// time, as those of the database are.
    fn select(self) -> String {
        let Self { batch, count } = self;
        let persons = self.persons();
        let uuid = |ms: &str, seed: &str| {
            format!(
                "(lpad(to_hex({ms}), 12, '0') || '7' || left(md5({seed}), 3) || 'a' || substr(md5({seed}), 4, 15))::uuid"
            )
        };
        let (person, item) = (
            uuid("1760000000000 + p", "'p' || p"),
            uuid("1770000000000 + p * 10 + v", "'i' || p || '.' || v"),
        );
        format!(
            r#"
SELECT 'person' AS aggregate_type, id::text AS aggregate_id, v AS version, kind || '.new' AS type,
       CASE v WHEN 1 THEN person ELSE format(
           '{{"id":"%s","person_id":"%s",%s"value":%s,"created_at":"2026-03-01T10:00:00.%s+00:00","person":%s}}',
           {item}, id, CASE WHEN kind <> 'debt' THEN '"type":"renting",' END, 1000 + n % 9000,
           lpad((n % 1000000)::text, 6, '0'), person) END::json AS payload
FROM (SELECT n, p, n / {persons} + 1 AS v, {person} AS id,
             (ARRAY['person', 'income', 'asset', 'debt', 'income'])[n / {persons} + 1] AS kind
      FROM (SELECT n, {batch}::bigint * {persons} + n % {persons} AS p
            FROM generate_series(0, {count}::bigint - 1) n) n) n,
     LATERAL (SELECT format(
         '{{"id":"%s","cpf":%s,"name":"Maria da Silva Santos","address":"Rua das Laranjeiras 100, Rio de Janeiro","date_of_birth":"1980-05-17T00:00:00+00:00","created_at":"2026-03-01T09:00:00.123456+00:00"}}',
         id, p + 1) AS person OFFSET 0) body
ORDER BY n"#
        )
    }

    /// Appends them to the outbox, as a writer does: without a position.
    pub(crate) async fn append(self, traced: Traced, conn: &mut PgConnection) -> anyhow::Result<()> {
        let columns = "aggregate_type, aggregate_id, version, type, payload";
        let (events, headers) = (self.select(), traced.headers());
        let sql = format!(
            "INSERT INTO outbox.event ({columns}, headers) SELECT {columns}, {headers} FROM ({events}) e"
        );
        conn.execute(AssertSqlSafe(sql)).await?;
        Ok(())
    }

    /// The messages that a relay would make of them.
    pub(crate) async fn messages(self, conn: &mut PgConnection) -> anyhow::Result<Vec<Message>> {
        let sql = format!(
            "SELECT gen_random_uuid(), aggregate_type, aggregate_id, version, type, payload::text, now()
             FROM ({}) e",
            self.select()
        );
        messages(conn, sql).await
    }
}

/// The messages of the events above a position.
pub(crate) async fn above(conn: &mut PgConnection, position: i64) -> anyhow::Result<Vec<Message>> {
    let sql = format!(
        "SELECT id, aggregate_type, aggregate_id, version, type, payload::text, created_at
         FROM outbox.event WHERE position > {position} ORDER BY position"
    );
    messages(conn, sql).await
}

/// A message, ready to be published.
#[derive(Clone, Debug)]
pub(crate) struct Message {
    pub(crate) key: ShortString,
    pub(crate) properties: BasicProperties,
    pub(crate) body: Vec<u8>,
}

type Row = (Uuid, String, String, i64, String, String, DateTime<Utc>);

async fn messages(conn: &mut PgConnection, sql: String) -> anyhow::Result<Vec<Message>> {
    let rows: Vec<Row> = sqlx::query_as(AssertSqlSafe(sql)).fetch_all(conn).await?;
    Ok(rows.into_iter().map(Message::from).collect())
}

/// With everything that the relay gives a message.
impl From<Row> for Message {
    fn from((id, aggregate_type, aggregate_id, version, type_, payload, created_at): Row) -> Self {
        let text = |text: &str| AMQPValue::LongString(text.into());
        let mut headers = FieldTable::default();
        headers.insert("aggregate_type".into(), text(&aggregate_type));
        headers.insert("aggregate_id".into(), text(&aggregate_id));
        headers.insert("aggregate_version".into(), AMQPValue::LongLongInt(version));
        let key: ShortString = type_.as_str().into();
        let properties = BasicProperties::default()
            .with_message_id(id.to_string().as_str().into())
            .with_type(key.clone())
            .with_app_id("person".into())
            .with_user_id(rabbitmq::USER.into())
            .with_timestamp(u64::try_from(created_at.timestamp()).unwrap_or(0))
            .with_content_type("application/json".into())
            .with_delivery_mode(2)
            .with_headers(headers);
        Self { key, properties, body: payload.into_bytes() }
    }
}

/// Bytes of a message's body, on average.
pub(crate) fn mean_body(messages: &[Message]) -> f64 {
    let bytes = messages.iter().map(|message| message.body.len()).sum::<usize>();
    float(i64::try_from(bytes).unwrap_or(0)) / float(i64::try_from(messages.len()).unwrap_or(1))
}
