//! An event as it stands in the outbox.

use chrono::{DateTime, Utc};
use uuid::Uuid;

/// An event as it stands in the outbox.
#[derive(Clone, Debug)]
pub struct Event {
    /// Its place in the order of reading.
    pub position: i64,
    /// Its own id.
    pub id: Uuid,
    /// What kind of thing it is about.
    pub aggregate_type: String,
    /// Which one.
    pub aggregate_id: String,
    /// Which event of that one: 1, 2, 3, …
    pub version: i64,
    /// Its type and routing key.
    pub type_: String,
    /// Its body, byte for byte.
    pub payload: Box<str>,
    /// Extra AMQP headers.
    pub headers: Option<serde_json::Map<String, serde_json::Value>>,
    /// When its writer's transaction began.
    pub created_at: DateTime<Utc>,
    /// The id of the aggregate's event before it; none at the start of a chain, and where it is not known.
    pub previous_id: Option<Uuid>,
}

impl Event {
    /// About how many bytes of memory it holds.
    pub fn size(&self) -> usize {
        // Headers are few and small; what they take is covered by the flat amount.
        self.payload.len() + self.type_.len() + self.aggregate_type.len() + self.aggregate_id.len() + 512
    }
}
