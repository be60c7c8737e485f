//! What can go wrong, and to whom.

use std::{fmt, time::Duration};

use serde::Serialize;

/// How long a killed node of the broker takes to be back, about: the next fault of it comes after that.
const BOOT: u64 = 12_000;

/// One of the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[expect(missing_docs, reason = "they are called like their programs")]
pub enum Member {
    PersonApi,
    PersonRelay1,
    PersonRelay2,
    Projector1,
    Projector2,
    ScoreRelay,
    ScoreApi,
}

impl Member {
    /// All of them, in the order in which an event passes them.
    pub const ALL: [Self; 7] = [
        Self::PersonApi,
        Self::PersonRelay1,
        Self::PersonRelay2,
        Self::Projector1,
        Self::Projector2,
        Self::ScoreRelay,
        Self::ScoreApi,
    ];

    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::PersonApi => "person-api",
            Self::PersonRelay1 => "person-relay-1",
            Self::PersonRelay2 => "person-relay-2",
            Self::Projector1 => "score-projector-1",
            Self::Projector2 => "score-projector-2",
            Self::ScoreRelay => "score-relay",
            Self::ScoreApi => "score-api",
        }
    }

    /// Whether it speaks to the broker.
    pub fn has_broker(self) -> bool {
        !matches!(self, Self::PersonApi | Self::ScoreApi)
    }
}

/// A wire between two of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Place {
    /// Between the clients and person-api.
    Clients,
    /// Between a program and PostgreSQL.
    Database(Member),
    /// Between a program and RabbitMQ.
    Broker(Member),
}

impl Place {
    /// All of them.
    pub fn all() -> Vec<Self> {
        let brokers = Member::ALL.into_iter().filter(|member| member.has_broker()).map(Self::Broker);
        [Self::Clients].into_iter().chain(Member::ALL.map(Self::Database)).chain(brokers).collect()
    }

    /// Who notices.
    pub(crate) fn member(self) -> Option<Member> {
        match self {
            Self::Clients => None,
            Self::Database(member) | Self::Broker(member) => Some(member),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Clients => f.write_str("clients to person-api"),
            Self::Database(member) => write!(f, "{} to PostgreSQL", member.name()),
            Self::Broker(member) => write!(f, "{} to RabbitMQ", member.name()),
        }
    }
}

/// What of a wire is silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Direction {
    /// Nothing passes.
    Both,
    /// Requests do not arrive.
    ToServer,
    /// Requests arrive and are carried out, and their answers do not come.
    FromServer,
}

/// A database of the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[expect(missing_docs, reason = "they are called like their databases")]
pub enum Database {
    Person,
    Score,
}

impl Database {
    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::Person => "person",
            Self::Score => "score",
        }
    }
}

/// A transaction that somebody leaves open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Open {
    /// It only holds a snapshot, in the person database.
    Reading,
    /// The same, in another database of the server.
    ReadingElsewhere,
    /// It has appended an event, and then does nothing for long.
    Appending,
    /// It has appended an event and was prepared (two-phase commit), so no session has it.
    Prepared,
    /// It was prepared in another database.
    PreparedElsewhere,
}

/// A fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum What {
    /// SIGKILL, and a successor soon.
    Killed(Member),
    /// SIGSTOP, then SIGCONT.
    Stopped(Member),
    /// SIGKILL of the node, which is started again.
    BrokerKilled,
    /// `rabbitmqctl stop_app`, then `start_app`.
    BrokerApp,
    /// SIGSTOP of the node: connections stay open, and nobody answers.
    BrokerStopped,
    /// Its memory alarm: it takes nothing from publishers.
    BrokerBlocked,
    /// An operator closes all connections.
    ConnectionsClosed,
    /// Every channel ends with an error.
    ChannelsClosed,
    /// The projector's queue loses its binding, and gets it back.
    ScoreUnbound,
    /// Nobody listens to notes and memos for a while: these events are unroutable.
    NotesUnbound,
    /// Nobody listens to memos, and everybody to notes, which have the same event types.
    MemosUnbound,
    /// A queue for notes takes one, and refuses what comes after it.
    QueueFull,
    /// The relay's user may not publish the types of notes.
    TypeDenied,
    /// A body is larger than this broker takes.
    BodyTooLarge,
    /// A row is stored that no message can carry.
    RowUnsendable,
    /// Somebody publishes in the name of a source that is not theirs.
    ForeignSender,
    /// A database takes no writes.
    ReadOnly(Database),
    /// PostgreSQL is stopped in its `immediate` mode and started again: a crash.
    DatabaseCrashed,
    /// PostgreSQL is killed while its WAL writer stalls: what was committed asynchronously is lost. Not in
    /// random plans.
    CommitsLost,
    /// Every session of the programs is ended (`pg_terminate_backend`).
    SessionsEnded,
    /// Somebody leaves a transaction open; at the end it is committed, or not.
    Transaction(Open, bool),
    /// A wire is slow by so many milliseconds.
    Slow(Place, u64),
    /// A wire is cut.
    Cut(Place),
    /// A wire is silent.
    Silent(Place, Direction),
}

impl What {
    /// What it counts as.
    pub fn kind(self) -> &'static str {
        match self {
            Self::Killed(_) => "a program killed",
            Self::Stopped(_) => "a program stopped and continued",
            Self::BrokerKilled => "RabbitMQ killed",
            Self::BrokerApp => "RabbitMQ's application stopped",
            Self::BrokerStopped => "RabbitMQ stopped and continued",
            Self::BrokerBlocked => "RabbitMQ's memory alarm",
            Self::ConnectionsClosed => "all connections closed",
            Self::ChannelsClosed => "all channels closed",
            Self::ScoreUnbound => "the projector's binding removed",
            Self::NotesUnbound => "a type's only binding removed",
            Self::MemosUnbound => "one of two bindings of a type removed",
            Self::QueueFull => "a full queue",
            Self::TypeDenied => "a type that the relay may not publish",
            Self::BodyTooLarge => "an event that the broker refuses",
            Self::RowUnsendable => "a row that cannot be sent",
            Self::ForeignSender => "a foreign sender",
            Self::ReadOnly(_) => "a read-only database",
            Self::DatabaseCrashed => "PostgreSQL stopped (immediate)",
            Self::CommitsLost => "PostgreSQL killed, with commits lost",
            Self::SessionsEnded => "all sessions ended",
            Self::Transaction(Open::Reading | Open::ReadingElsewhere, _) => "a long transaction",
            Self::Transaction(Open::Appending, _) => "an idle transaction that has appended",
            Self::Transaction(Open::Prepared | Open::PreparedElsewhere, _) => "a prepared transaction",
            Self::Slow(..) => "a slow wire",
            Self::Cut(_) => "a cut wire",
            Self::Silent(..) => "a half-open wire",
        }
    }

    /// What no two faults have at the same time, and for how many milliseconds it is not well afterwards.
    pub(crate) fn subject(self) -> Option<(String, u64)> {
        let subject = match self {
            Self::Killed(member) | Self::Stopped(member) => (member.name().to_owned(), 1_000),
            Self::BrokerKilled | Self::BrokerApp => ("broker".to_owned(), BOOT),
            Self::BrokerStopped | Self::BrokerBlocked => ("broker".to_owned(), 2_000),
            Self::ConnectionsClosed | Self::ChannelsClosed => ("broker".to_owned(), 1_000),
            Self::ScoreUnbound | Self::ForeignSender => ("score".to_owned(), 1_000),
            Self::NotesUnbound | Self::MemosUnbound | Self::TypeDenied => ("notes".to_owned(), 1_000),
            Self::DatabaseCrashed | Self::CommitsLost | Self::SessionsEnded | Self::ReadOnly(_) => {
                ("database".to_owned(), 3_000)
            }
            Self::Transaction(..) | Self::QueueFull | Self::BodyTooLarge | Self::RowUnsendable => {
                return None;
            }
            Self::Slow(place, _) | Self::Cut(place) | Self::Silent(place, _) => (place.to_string(), 1_000),
        };
        Some(subject)
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind())?;
        match self {
            Self::Killed(member) | Self::Stopped(member) => write!(f, ": {}", member.name()),
            Self::Transaction(open, commits) => {
                write!(f, ": {open:?}, {}", if *commits { "committed" } else { "rolled back" })
            }
            Self::Slow(place, delay) => write!(f, ": {place}, {delay} ms"),
            Self::Cut(place) => write!(f, ": {place}"),
            Self::Silent(place, direction) => write!(f, ": {place}, {direction:?}"),
            Self::ReadOnly(database) => write!(f, ": {}", database.name()),
            _ => Ok(()),
        }
    }
}

/// A fault with its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Fault {
    /// When it begins, in milliseconds from the beginning of the load.
    pub at: u64,
    /// How long it lasts, in milliseconds.
    pub lasts: u64,
    /// What it is.
    pub what: What,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = |ms: u64| Duration::from_millis(ms).as_secs_f32();
        write!(f, "{:7.1} s  for {:4.1} s  {}", seconds(self.at), seconds(self.lasts), self.what)
    }
}
