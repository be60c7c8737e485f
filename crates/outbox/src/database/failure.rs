//! What a failure of the database means for the program that asked. What it means for people is in [`meaning`].
//!
//! [`meaning`]: super::meaning

use super::POOLER;

/// The connection has no session of its own, and the program needs one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{POOLER}")]
pub struct SharedSessions;

impl From<SharedSessions> for sqlx::Error {
    fn from(shared: SharedSessions) -> Self {
        Self::Configuration(Box::new(shared))
    }
}

/// Why a statement failed, by what can be done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// No connection, or it broke. Whether a statement that was under way took effect is unknown. `PgBouncer` says so with
    /// 08P01.
    Away,
    /// The server rolled the statement back in favour of another transaction: the same one succeeds as a rule
    /// when it is sent again at once (40001, 40P01 and their class).
    Conflict,
    /// A lock was not free in time (55P03).
    Locked,
    /// The statement took longer than it may, or was cancelled by an operator (57014).
    Cancelled,
    /// The server shuts down or starts, or ended the session (class 57).
    Restarting,
    /// The server lacks disk space, memory or connections (class 53).
    Resources,
    /// The transaction may only read (25006): a standby, or `default_transaction_read_only`.
    ReadOnly,
    /// The login was refused (class 28), or there is no such database (3D000).
    Login,
    /// The role lacks a right, or row security would hide rows from it (42501).
    Forbidden,
    /// The statements of one connection reach different sessions: a pooler in transaction mode.
    Pooler,
    /// A defect: of the statement, of the schema or of a value.
    Defect,
}

impl Failure {
    /// What kind of failure `error` is.
    pub fn of(error: &sqlx::Error) -> Self {
        let database = match error {
            sqlx::Error::Database(database) => database,
            sqlx::Error::Io(_)
            | sqlx::Error::Tls(_)
            | sqlx::Error::Protocol(_)
            | sqlx::Error::PoolTimedOut
            | sqlx::Error::PoolClosed
            | sqlx::Error::WorkerCrashed => return Self::Away,
            sqlx::Error::Configuration(error) if error.is::<SharedSessions>() => return Self::Pooler,
            _ => return Self::Defect,
        };
        Self::of_code(database.code().as_deref().unwrap_or_default())
    }

    /// As [`of`](Self::of), by the SQLSTATE.
    pub fn of_code(code: &str) -> Self {
        match code {
            "55P03" => Self::Locked,
            "57014" => Self::Cancelled,
            "25006" => Self::ReadOnly,
            "42501" => Self::Forbidden,
            "3D000" => Self::Login,
            // A statement that was prepared on another session, or that another client has prepared on this one.
            "26000" | "42P05" => Self::Pooler,
            _ => match code.get(..2).unwrap_or_default() {
                "08" => Self::Away,
                "28" => Self::Login,
                "40" => Self::Conflict,
                "53" => Self::Resources,
                "57" => Self::Restarting,
                _ => Self::Defect,
            },
        }
    }

    /// Whether the same statement may succeed later without a change to the program or its data.
    pub fn passes(self) -> bool {
        !matches!(self, Self::Login | Self::Forbidden | Self::Pooler | Self::Defect)
    }
}

#[cfg(test)]
mod tests {
    use super::Failure::{self, *};

    #[test]
    fn each_code_has_its_kind() {
        for (code, kind, passes) in [
            ("40001", Conflict, true),
            ("40P01", Conflict, true),
            ("55P03", Locked, true),
            ("57014", Cancelled, true),
            ("57P01", Restarting, true),
            ("57P05", Restarting, true),
            ("53100", Resources, true),
            ("53300", Resources, true),
            ("25006", ReadOnly, true),
            ("08006", Away, true),
            ("08P01", Away, true),
            ("26000", Pooler, false),
            ("42P05", Pooler, false),
            ("28P01", Login, false),
            ("3D000", Login, false),
            ("42501", Forbidden, false),
            ("42P01", Defect, false),
            ("23505", Defect, false),
            ("", Defect, false),
            ("ü", Defect, false),
        ] {
            assert_eq!((Failure::of_code(code), Failure::of_code(code).passes()), (kind, passes), "{code}");
        }
    }
}
