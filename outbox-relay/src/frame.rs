//! How large the frame of a message's headers is. AMQP splits a body into frames, and never the headers: a broker ends
//! the connection over one that is larger than what both sides agreed on.

use lapin::{
    BasicProperties,
    types::{AMQPValue, FieldTable, ShortString},
};

/// Frame type, channel, size and end; then class, weight, body size and the flags of the properties.
const REST: usize = 8 + 12 + 2;

/// The bytes of the frame with these properties.
pub(crate) fn headers(properties: &BasicProperties) -> usize {
    let text = |text: &Option<ShortString>| text.as_ref().map_or(0, short);
    REST + properties.headers().as_ref().map_or(0, table)
        + text(properties.content_type())
        + text(properties.content_encoding())
        + text(properties.correlation_id())
        + text(properties.reply_to())
        + text(properties.expiration())
        + text(properties.message_id())
        + text(properties.kind())
        + text(properties.user_id())
        + text(properties.app_id())
        + text(properties.cluster_id())
        + properties.delivery_mode().map_or(0, |_| 1)
        + properties.priority().map_or(0, |_| 1)
        + properties.timestamp().map_or(0, |_| 8)
}

fn short(text: &ShortString) -> usize {
    1 + text.as_str().len()
}

fn table(table: &FieldTable) -> usize {
    let fields = table.inner().iter();
    4 + fields.map(|(name, field)| short(name) + 1 + value(field)).sum::<usize>()
}

/// Without the byte of its type. Tables and arrays are as deep as our own messages make them.
fn value(field: &AMQPValue) -> usize {
    match field {
        AMQPValue::Void => 0,
        AMQPValue::Boolean(_) | AMQPValue::ShortShortInt(_) | AMQPValue::ShortShortUInt(_) => 1,
        AMQPValue::ShortInt(_) | AMQPValue::ShortUInt(_) => 2,
        AMQPValue::LongInt(_) | AMQPValue::LongUInt(_) | AMQPValue::Float(_) => 4,
        AMQPValue::DecimalValue(_) => 5,
        AMQPValue::LongLongInt(_) | AMQPValue::Double(_) | AMQPValue::Timestamp(_) => 8,
        AMQPValue::ShortString(text) => short(text),
        AMQPValue::LongString(text) => 4 + text.as_bytes().len(),
        AMQPValue::ByteArray(bytes) => 4 + bytes.as_slice().len(),
        AMQPValue::FieldArray(array) => {
            4 + array.as_slice().iter().map(|field| 1 + value(field)).sum::<usize>()
        }
        AMQPValue::FieldTable(fields) => table(fields),
    }
}
