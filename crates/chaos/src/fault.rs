//! The faults, and the parts of the system that can have them.

use std::{fmt, time::Duration};

use serde::Serialize;

/// About how long the broker needs to start, in milliseconds. Its next fault comes after that.
const BROKER_START: u64 = 12_000;

/// One running program. Relay of persons and projector run twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[expect(missing_docs, reason = "they are called like their programs")]
pub enum Instance {
    PersonApi,
    PersonRelay1,
    PersonRelay2,
    Projector1,
    Projector2,
    ScoreRelay,
    ScoreApi,
}

impl Instance {
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

    /// Its name in the plan and in the logs.
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

    /// Whether it connects to the broker.
    pub fn has_broker(self) -> bool {
        !matches!(self, Self::PersonApi | Self::ScoreApi)
    }
}

/// A network link between two parts, with a proxy on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Link {
    /// Between the clients and person-api.
    Clients,
    /// Between a program and PostgreSQL.
    Database(Instance),
    /// Between a program and RabbitMQ.
    Broker(Instance),
}

impl Link {
    /// All of them.
    pub fn all() -> Vec<Self> {
        let brokers = Instance::ALL.into_iter().filter(|instance| instance.has_broker()).map(Self::Broker);
        [Self::Clients].into_iter().chain(Instance::ALL.map(Self::Database)).chain(brokers).collect()
    }

    /// The program that the link belongs to.
    pub(crate) fn instance(self) -> Option<Instance> {
        match self {
            Self::Clients => None,
            Self::Database(instance) | Self::Broker(instance) => Some(instance),
        }
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Clients => f.write_str("clients to person-api"),
            Self::Database(instance) => write!(f, "{} to PostgreSQL", instance.name()),
            Self::Broker(instance) => write!(f, "{} to RabbitMQ", instance.name()),
        }
    }
}

/// Which direction of a half-open link loses what is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Direction {
    /// Both.
    Both,
    /// Requests do not arrive.
    ToServer,
    /// Requests arrive and are executed, and their responses are lost.
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
    /// Its name in the plan and in the logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Person => "person",
            Self::Score => "score",
        }
    }
}

/// A transaction of another client that stays open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum OpenTransaction {
    /// It holds a snapshot of the person database.
    Reading,
    /// It holds a snapshot of another database of the server.
    ReadingElsewhere,
    /// It has appended an event, and is idle.
    Appending,
    /// It has appended an event and is prepared (two-phase commit), so it belongs to no session.
    Prepared,
    /// It is prepared in another database of the server.
    PreparedElsewhere,
}

/// A fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Fault {
    /// SIGKILL, and a new start soon after.
    Killed(Instance),
    /// SIGSTOP, then SIGCONT.
    Stopped(Instance),
    /// SIGKILL of the node, which is started again.
    BrokerKilled,
    /// `rabbitmqctl stop_app`, then `start_app`.
    BrokerApp,
    /// SIGSTOP of the node, then SIGCONT: connections stay open, and nothing responds.
    BrokerStopped,
    /// Its memory alarm: it accepts no message from publishers.
    BrokerBlocked,
    /// An operator closes all connections.
    ConnectionsClosed,
    /// Every channel is killed inside the broker.
    ChannelsClosed,
    /// The binding of the projector's queue is removed, and made again.
    ScoreUnbound,
    /// No queue is bound to notes and memos: these events are unroutable.
    NotesUnbound,
    /// No queue is bound to memos. Notes, which have the same event types, still have theirs.
    MemosUnbound,
    /// A second queue for notes is full, and refuses every message.
    QueueFull,
    /// The relay's user may not publish the types of notes.
    TypeDenied,
    /// A body is larger than the broker's limit.
    BodyTooLarge,
    /// A row is stored whose headers no message can carry.
    RowUnsendable,
    /// A sender that is no relay publishes in the name of a source.
    ForeignSender,
    /// A database is read-only.
    ReadOnly(Database),
    /// PostgreSQL is stopped in its `immediate` mode, which is a crash, and started again.
    DatabaseCrashed,
    /// PostgreSQL is killed while its WAL writer is suspended, so asynchronous commits are lost. Not in random plans.
    CommitsLost,
    /// A backup of the person database is taken when the fault begins, and takes the place of the database when it ends.
    Restored,
    /// A standby follows until the fault begins, and takes the place of the server when it ends.
    FailedOver,
    /// Every session of the programs is ended (`pg_terminate_backend`).
    SessionsEnded,
    /// A transaction stays open. At the end it is committed (`true`) or rolled back.
    Transaction(OpenTransaction, bool),
    /// A link delays everything by so many milliseconds.
    Slow(Link, u64),
    /// A link resets its connections.
    Cut(Link),
    /// A link loses what is sent in a direction.
    HalfOpen(Link, Direction),
}

impl Fault {
    /// The kind of fault, as reports count it.
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
            Self::Restored => "a backup restored, with the procedure",
            Self::FailedOver => "a failover that lost commits, with the procedure",
            Self::SessionsEnded => "all sessions ended",
            Self::Transaction(OpenTransaction::Reading | OpenTransaction::ReadingElsewhere, _) => {
                "a long transaction"
            }
            Self::Transaction(OpenTransaction::Appending, _) => "an idle transaction that has appended",
            Self::Transaction(OpenTransaction::Prepared | OpenTransaction::PreparedElsewhere, _) => {
                "a prepared transaction"
            }
            Self::Slow(..) => "a slow link",
            Self::Cut(_) => "a cut link",
            Self::HalfOpen(..) => "a half-open link",
        }
    }

    /// Whether it leaves something in a database, or in a queue that is filled from one, which has to be repaired before a
    /// copy of the database is taken or replaced. It waits for a procedure that is under way.
    pub(crate) fn needs_repair(self) -> bool {
        match self {
            Self::ScoreUnbound
            | Self::NotesUnbound
            | Self::MemosUnbound
            | Self::QueueFull
            | Self::TypeDenied
            | Self::BodyTooLarge
            | Self::RowUnsendable
            | Self::ForeignSender
            | Self::ReadOnly(_)
            | Self::DatabaseCrashed
            | Self::CommitsLost
            | Self::SessionsEnded
            | Self::Transaction(..) => true,
            Self::Killed(_)
            | Self::Stopped(_)
            | Self::BrokerKilled
            | Self::BrokerApp
            | Self::BrokerStopped
            | Self::BrokerBlocked
            | Self::ConnectionsClosed
            | Self::ChannelsClosed
            | Self::Slow(..)
            | Self::Cut(_)
            | Self::HalfOpen(..)
            // They wait themselves.
            | Self::Restored
            | Self::FailedOver => false,
        }
    }

    /// The part that has at most one fault at a time, and its recovery time after the fault in milliseconds. `None`: any
    /// number of them may overlap.
    pub(crate) fn subject(self) -> Option<(String, u64)> {
        let subject = match self {
            Self::Killed(instance) | Self::Stopped(instance) => (instance.name().to_owned(), 1_000),
            Self::BrokerKilled | Self::BrokerApp => ("broker".to_owned(), BROKER_START),
            Self::BrokerStopped | Self::BrokerBlocked => ("broker".to_owned(), 2_000),
            Self::ConnectionsClosed | Self::ChannelsClosed => ("broker".to_owned(), 1_000),
            Self::ScoreUnbound | Self::ForeignSender => ("score".to_owned(), 1_000),
            Self::NotesUnbound | Self::MemosUnbound | Self::TypeDenied => ("notes".to_owned(), 1_000),
            // The procedure needs about so long.
            Self::Restored | Self::FailedOver => ("time".to_owned(), 15_000),
            Self::DatabaseCrashed | Self::CommitsLost | Self::SessionsEnded | Self::ReadOnly(_) => {
                ("database".to_owned(), 3_000)
            }
            Self::Transaction(..) | Self::QueueFull | Self::BodyTooLarge | Self::RowUnsendable => {
                return None;
            }
            Self::Slow(link, _) | Self::Cut(link) | Self::HalfOpen(link, _) => (link.to_string(), 1_000),
        };
        Some(subject)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind())?;
        match self {
            Self::Killed(instance) | Self::Stopped(instance) => write!(f, ": {}", instance.name()),
            Self::Transaction(open, commits) => {
                write!(f, ": {open:?}, {}", if *commits { "committed" } else { "rolled back" })
            }
            Self::Slow(link, delay) => write!(f, ": {link}, {delay} ms"),
            Self::Cut(link) => write!(f, ": {link}"),
            Self::HalfOpen(link, direction) => write!(f, ": {link}, {direction:?}"),
            Self::ReadOnly(database) => write!(f, ": {}", database.name()),
            _ => Ok(()),
        }
    }
}

/// A fault and its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct ScheduledFault {
    /// When it begins, in milliseconds from the beginning of the workload.
    pub at: u64,
    /// How long it lasts, in milliseconds.
    pub lasts: u64,
    /// The fault.
    pub fault: Fault,
}

impl fmt::Display for ScheduledFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = |ms: u64| Duration::from_millis(ms).as_secs_f32();
        write!(f, "{:7.1} s  for {:4.1} s  {}", seconds(self.at), seconds(self.lasts), self.fault)
    }
}
