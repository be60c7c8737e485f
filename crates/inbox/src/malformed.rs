/// Why a message is not an event. Names the rule, never the value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// A property or header of every event is missing.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A property or header has a wrong value.
    #[error("{0} is not {1}")]
    Invalid(&'static str, &'static str),
    /// The headers break a rule for events.
    #[error("its headers {0}")]
    Headers(&'static str),
    /// The body is larger than an event's may be.
    #[error("its body is larger than 16 MiB")]
    Large,
}
