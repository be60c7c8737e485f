//! What an error of the database means, in words that may be shown to anybody.
//!
//! PostgreSQL's own messages name users and databases, and may quote a row: they are never repeated. SQLSTATE says
//! what happened, and this is the one place that says what to do then.

use sqlx::Error;

use super::SharedSessions;

/// What is set and prepared on a session is lost, or is another client's.
pub const POOLER: &str = "there is a pooler that does not keep one session for one connection; connect to PostgreSQL \
                          itself, or use the pooler's session mode";

/// What a SQLSTATE means, and what to do next. None where the code alone has to do.
pub fn meaning(code: &str) -> Option<&'static str> {
    Some(match code {
        "26000" | "42P05" => POOLER,
        "08P01" => {
            "a pooler gives no session, or has lost it; the pooler's log says why (in statement mode it refuses \
             transactions)"
        }
        "25006" => {
            "the server or the session is read-only; connect to the primary, and look at \
             default_transaction_read_only of the role and the database"
        }
        "28000" | "28P01" => {
            "the login is refused; check the user and the password of the database URL, and pg_hba.conf"
        }
        "3D000" => "the database does not exist; check its name in the database URL",
        "3F000" | "42P01" | "42703" | "42883" => {
            "an object of the schema is missing; run the program's migrate command"
        }
        "40001" | "40P01" => "the transaction met another one and was rolled back; it can be tried again",
        "42501" => {
            "the role lacks a right, or row security hides rows from it; run the program's migrate command with the \
             option that grants it, and disable row security for its tables"
        }
        "53100" => "the server's disk is full; free space on it",
        "53200" => "the server is out of memory",
        "53300" => {
            "no connection is left for this database or role; raise max_connections or the CONNECTION LIMIT, or run \
             fewer clients"
        }
        "53400" => "a limit of the server's configuration is reached, such as temp_file_limit",
        "55P03" => "a lock was not free in time; pg_locks shows who holds it",
        "57014" => "the statement was cancelled, or took longer than statement_timeout",
        "57P01" | "57P02" => "the server is shutting down or ended the session",
        "57P03" => "the server is starting up or shutting down",
        "58030" => "the server cannot read or write its files; look at its disk and its log",
        _ => return meaning_of_class(code.get(..2)?),
    })
}

fn meaning_of_class(class: &str) -> Option<&'static str> {
    Some(match class {
        "08" => "the connection failed",
        "28" => "the login is refused; check the user and the password of the database URL",
        "53" => "the server lacks a resource; look at its log",
        "58" => "the server has trouble with its system; look at its disk and its log",
        "XX" => "the server reports corruption or a defect; look at its log",
        _ => return None,
    })
}

/// What happened, as a part of a sentence: a SQLSTATE with its meaning, or what is wrong with the connection.
pub fn describe(error: &Error) -> String {
    match error {
        Error::Database(database) => {
            let mut text = format!("SQLSTATE {}", database.code().unwrap_or_default());
            if let Some(constraint) = database.constraint() {
                text = format!("{text}, constraint {constraint}");
            }
            match database.code().as_deref().and_then(meaning) {
                Some(meaning) => format!("{text}: {meaning}"),
                None => text,
            }
        }
        Error::Io(error) => error.to_string(),
        // It may go on with names of hosts, which are in quotation marks.
        Error::Tls(error) => {
            let said = error.to_string();
            format!("TLS: {}", said.split('"').next().unwrap_or_default().trim_end())
        }
        Error::PoolTimedOut => "no connection in time".to_owned(),
        Error::PoolClosed => "the pool is closed".to_owned(),
        Error::Configuration(error) if error.is::<SharedSessions>() => error.to_string(),
        Error::Protocol(_) => "the connection broke off, or this is not PostgreSQL".to_owned(),
        _ => "its answer was not understood".to_owned(),
    }
}

/// Why a program waits for its database, as a sentence for its readiness.
pub fn reason(error: &Error) -> String {
    let subject = match error {
        Error::Database(_) => "the database refuses",
        _ => "the database does not answer",
    };
    format!("{subject}: {}", describe(error))
}
