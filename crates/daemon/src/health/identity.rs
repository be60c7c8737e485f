//! Which process it is.

use std::{collections::BTreeMap, time::Duration};

use serde_json::json;
use sha2::{Digest, Sha256};

use super::{Member, series::label};
use crate::config::{
    SettingError,
    database::{Database, DatabaseArgs},
};

/// What is for comparing alone.
const NO_LABELS: [&str; 2] = ["program", "database"];

/// Which process it is: `/ready` says it, and the `health` command compares it. Another process at the same address must
/// not pass for this one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    pub(super) parts: BTreeMap<&'static str, String>,
    pub(super) members: BTreeMap<Member, Self>,
}

impl Identity {
    /// Of a program with this name.
    pub fn of(program: &str) -> Self {
        Self::default().with("program", program)
    }

    /// With a part more, such as the name of a relay.
    #[must_use]
    pub fn with(mut self, part: &'static str, value: impl Into<String>) -> Self {
        self.parts.insert(part, value.into());
        self
    }

    /// With one of several things that the program does the same for.
    #[must_use]
    pub fn with_member(mut self, kind: &'static str, name: &str, identity: Self) -> Self {
        self.members.insert(Member { kind, name: name.into() }, identity);
        self
    }

    /// With a part that may not be asked for.
    #[must_use]
    pub fn with_some(self, part: &'static str, value: Option<impl Into<String>>) -> Self {
        match value {
            Some(value) => self.with(part, value),
            None => self,
        }
    }

    /// With the database that a program uses: its host, port and name as a digest, since `/ready` is open to all.
    #[must_use]
    pub fn at(self, database: &Database) -> Self {
        let database = database.options();
        let host = match database.get_socket().map(|path| path.display().to_string()) {
            Some(socket) => socket,
            None => match database.get_host() {
                "127.0.0.1" | "::1" | "[::1]" => "localhost".to_owned(),
                host => host.to_ascii_lowercase(),
            },
        };
        let name = database.get_database().unwrap_or(database.get_username());
        let digest = Sha256::digest(format!("{host}\n{}\n{name}", database.get_port()));
        let first = digest.iter().take(8).fold(0_u64, |first, byte| first << 8 | u64::from(*byte));
        self.with("database", format!("{first:016x}"))
    }

    /// With the database that the settings name, where they name one.
    pub fn at_known(self, args: &DatabaseArgs) -> Result<Self, SettingError> {
        if args.database_url_file.is_none() && args.database_url.is_none() {
            return Ok(self);
        }
        Ok(self.at(&args.options("health", Duration::from_secs(1))?))
    }

    /// The labels that its metrics have, as they are rendered.
    pub(super) fn labels(&self) -> Vec<String> {
        let known = self.parts.iter().filter(|(name, _)| !NO_LABELS.contains(name));
        known.map(|(name, value)| label(name, value)).collect()
    }

    pub(super) fn to_json(&self) -> serde_json::Value {
        let mut json = json!(self.parts);
        for (member, identity) in &self.members {
            json[member.kind][&*member.name] = identity.to_json();
        }
        json
    }

    /// What another process is instead, in words; none if it is the one that is asked for.
    pub(crate) fn differs_from(&self, said: &serde_json::Value) -> Option<String> {
        let differences = self.differences(said, "it", "its");
        (!differences.is_empty()).then(|| differences.join("; "))
    }

    fn differences(&self, said: &serde_json::Value, it: &str, its: &str) -> Vec<String> {
        let differs = |(part, asked): (&&str, &String)| {
            let said = said.get(*part).and_then(serde_json::Value::as_str);
            (said != Some(asked.as_str())).then(|| match (*part, said) {
                ("database", Some(_)) => format!("{it} uses another database than DATABASE_URL names"),
                (_, Some(said)) => format!("{its} {part} is {said:?}, and not {asked:?}"),
                (_, None) => format!("{it} does not say that its {part} is {asked:?}"),
            })
        };
        let mut differences: Vec<String> = self.parts.iter().filter_map(differs).collect();
        for (Member { kind, name }, identity) in &self.members {
            match said.get(*kind).and_then(|members| members.get(&**name)) {
                Some(said) => {
                    let member = format!("{kind} {name}");
                    differences.extend(identity.differences(said, &member, &format!("{member}:")));
                }
                None => differences.push(format!("{it} does not have the {kind} {name:?}")),
            }
        }
        differences
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_process_is_told_apart() {
        let database = |url: &str| Identity::of("outbox-relay").at(&url.parse().unwrap());
        let one = database("postgres://a:b@localhost:5432/shop");
        assert_eq!(one, database("postgres://other:secret@127.0.0.1/shop"));
        for other in
            ["postgres://a@localhost/bank", "postgres://a@localhost:5433/shop", "postgres://a@db/shop"]
        {
            assert_ne!(one, database(other), "{other}");
        }
        let said = json!({"program": "outbox-relay", "relay": "default", "database": "0123456789abcdef"});
        let asked = Identity::of("outbox-relay").with("relay", "default");
        assert_eq!(asked.differs_from(&said), None);
        let differs = |asked: Identity| asked.differs_from(&said).unwrap_or_default();
        let shown = [
            differs(asked.clone().with("relay", "replay")),
            differs(Identity::of("another")),
            differs(asked.clone().with_some("source", Some("shop"))),
            differs(asked.at(&"postgres://localhost/shop".parse().unwrap())),
            Identity::of("another").differs_from(&json!(null)).unwrap_or_default(),
        ];
        insta::assert_snapshot!(shown.join("\n"), @r#"
        its relay is "default", and not "replay"
        its program is "outbox-relay", and not "another"
        it does not say that its source is "shop"
        it uses another database than DATABASE_URL names
        it does not say that its program is "another"
        "#);
    }
}
