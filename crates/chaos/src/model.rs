//! What a client knows of a person: the state that its acknowledged writes have made. It shares no code with
//! the programs; also what an item is worth is written down once more.

use std::collections::BTreeMap;

use anyhow::{Context, bail};
use rand::{RngExt, rngs::Xoshiro256PlusPlus};
use serde_json::{Value, json};
use uuid::Uuid;

/// A kind of item.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum ItemKind {
    Income,
    Asset,
    Debt,
}

impl ItemKind {
    pub(crate) const ALL: [Self; 3] = [Self::Income, Self::Asset, Self::Debt];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Income => "income",
            Self::Asset => "asset",
            Self::Debt => "debt",
        }
    }

    pub(crate) fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// An amount in ten-thousandths: four decimals, exactly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Amount(pub(crate) i64);

impl Amount {
    /// From `1234.5`, with any number of noughts at the end.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (whole, decimals) = text.split_once('.').unwrap_or((text, ""));
        let decimals = decimals.trim_end_matches('0');
        if decimals.len() > 4 {
            return None;
        }
        let decimals: i64 = format!("{decimals:0<4}").parse().ok()?;
        Some(Self(whole.parse::<i64>().ok()?.checked_mul(10_000)?.checked_add(decimals)?))
    }

    fn text(self) -> String {
        format!("{}.{:04}", self.0 / 10_000, self.0 % 10_000)
    }
}

/// An item.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Item {
    pub(crate) kind: ItemKind,
    /// A debt has none.
    pub(crate) type_: Option<String>,
    pub(crate) value: Amount,
}

impl Item {
    pub(crate) fn random(kind: ItemKind, random: &mut Xoshiro256PlusPlus) -> Self {
        let names = ["renting", "salary", "house", "car"];
        let type_ = (kind != ItemKind::Debt).then(|| names[random.random_range(0..names.len())].to_owned());
        Self { kind, type_, value: Amount(random.random_range(0..1_000_000_000)) }
    }

    /// What it adds to the score: an asset a twentieth, an income a fiftieth, a debt takes a twentieth;
    /// rounded down before the sign.
    pub(crate) fn points(&self) -> i64 {
        match self.kind {
            ItemKind::Asset => self.value.0 / (20 * 10_000),
            ItemKind::Income => self.value.0 / (50 * 10_000),
            ItemKind::Debt => -(self.value.0 / (20 * 10_000)),
        }
    }

    fn body(&self) -> String {
        let type_ = self.type_.as_ref().map(|type_| format!("{}: {}, ", json!("type"), json!(type_)));
        format!("{{{}\"value\": {}}}", type_.unwrap_or_default(), self.value.text())
    }

    fn read(kind: ItemKind, value: &Value) -> anyhow::Result<(Uuid, Self)> {
        let amount = value["value"].as_number().and_then(|number| Amount::parse(&number.to_string()));
        let type_ = value["type"].as_str().map(str::to_owned);
        Ok((uuid(value)?, Self { kind, type_, value: amount.context("an item without a value")? }))
    }
}

/// A person and their items.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Person {
    pub(crate) cpf: i64,
    pub(crate) id: Uuid,
    pub(crate) version: i64,
    pub(crate) name: String,
    pub(crate) address: Option<String>,
    pub(crate) active: bool,
    pub(crate) items: BTreeMap<Uuid, Item>,
}

impl Person {
    /// Names the state, as the API's `ETag` does.
    pub(crate) fn token(&self) -> String {
        format!("\"{}.{}\"", self.id, self.version)
    }

    /// How many baselines lead from `self` to `found`, if nothing else does.
    pub(crate) fn baselines_to(&self, found: &Self, at_most: u64) -> Option<u64> {
        let raised = u64::try_from(found.version - self.version).ok().filter(|raised| *raised <= at_most)?;
        (Self { version: found.version, ..self.clone() } == *found).then_some(raised)
    }

    pub(crate) fn score(&self) -> i64 {
        self.items.values().map(Item::points).sum()
    }

    /// From the answer to `GET /person/{cpf}`.
    pub(crate) fn read(body: &Value, version: i64) -> anyhow::Result<Self> {
        let mut items = BTreeMap::new();
        for kind in ItemKind::ALL {
            let list = body[format!("{}s", kind.name())].as_array().context("a list of items is missing")?;
            for item in list {
                let (id, item) = Item::read(kind, item)?;
                items.insert(id, item);
            }
        }
        if body["version"].as_i64() != Some(version) {
            bail!("the body's version is not that of the ETag");
        }
        Ok(Self {
            cpf: body["cpf"].as_i64().context("no cpf")?,
            id: uuid(body)?,
            version,
            name: body["name"].as_str().context("no name")?.to_owned(),
            address: body["address"].as_str().map(str::to_owned),
            active: body["status"] == "active",
            items,
        })
    }
}

fn uuid(value: &Value) -> anyhow::Result<Uuid> {
    Ok(value["id"].as_str().context("no id")?.parse()?)
}

/// What a client asks for.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    Create { cpf: i64, name: String, address: Option<String> },
    Add(Item),
    Replace(Uuid, Item),
    Remove(Uuid),
    Patch { name: String, address: Option<String>, active: bool },
    Delete,
}

/// A request, but for the headers.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) method: reqwest::Method,
    pub(crate) path: String,
    pub(crate) body: Option<String>,
}

impl Change {
    /// The request that asks for it, of the person with this cpf.
    pub(crate) fn request(&self, cpf: i64, before: Option<&Person>) -> Request {
        use reqwest::Method;
        let kind_of = |id: &Uuid| {
            before.and_then(|person| person.items.get(id)).map_or("income", |item| item.kind.name())
        };
        let (method, path, body) = match self {
            Self::Create { cpf, name, address } => {
                let body =
                    json!({"cpf": cpf, "name": name, "address": address, "date_of_birth": "1980-05-17"});
                (Method::POST, "/person".to_owned(), Some(body.to_string()))
            }
            Self::Add(item) => {
                (Method::POST, format!("/person/{cpf}/{}", item.kind.name()), Some(item.body()))
            }
            Self::Replace(id, item) => {
                (Method::PUT, format!("/person/{cpf}/{}/{id}", item.kind.name()), Some(item.body()))
            }
            Self::Remove(id) => (Method::DELETE, format!("/person/{cpf}/{}/{id}", kind_of(id)), None),
            Self::Patch { name, address, active } => {
                let status = if *active { "active" } else { "inactive" };
                let body = json!({"name": name, "address": address, "status": status});
                (Method::PATCH, format!("/person/{cpf}"), Some(body.to_string()))
            }
            Self::Delete => (Method::DELETE, format!("/person/{cpf}"), None),
        };
        Request { method, path, body }
    }

    /// The state after it. `id`: that of the new record, where there is one.
    pub(crate) fn apply(&self, before: Option<&Person>, id: Uuid) -> Option<Person> {
        if let Self::Create { cpf, name, address } = self {
            let (name, address) = (name.clone(), address.clone());
            let (version, active, items) = (1, true, BTreeMap::new());
            return Some(Person { cpf: *cpf, id, version, name, address, active, items });
        }
        let mut person = before?.clone();
        person.version += 1;
        match self {
            Self::Create { .. } | Self::Delete => return None,
            Self::Add(item) => {
                person.items.insert(id, item.clone());
            }
            Self::Replace(id, item) => {
                person.items.insert(*id, item.clone());
            }
            Self::Remove(id) => {
                person.items.remove(id);
            }
            Self::Patch { name, address, active } => {
                (person.name, person.address) = (name.clone(), address.clone());
                person.active = *active;
            }
        }
        Some(person)
    }

    /// Whether it leads from `before` to `found`; the id of the record, then.
    pub(crate) fn leads(&self, before: Option<&Person>, found: Option<&Person>) -> Option<Uuid> {
        let id = match (self, before, found) {
            (Self::Create { .. }, _, Some(found)) => found.id,
            (Self::Add(_), Some(before), Some(found)) => {
                *found.items.keys().find(|id| !before.items.contains_key(*id))?
            }
            (Self::Replace(id, _) | Self::Remove(id), _, _) => *id,
            (Self::Patch { .. } | Self::Delete, Some(before), _) => before.id,
            _ => return None,
        };
        (self.apply(before, id).as_ref() == found).then_some(id)
    }

    /// The same, although up to `baselines` baselines may have raised the version before or after it. Also how many did.
    pub(crate) fn leads_beside(
        &self,
        before: Option<&Person>,
        found: Option<&Person>,
        baselines: u64,
    ) -> Option<(Uuid, i64)> {
        (0..=i64::try_from(baselines).unwrap_or(0)).find_map(|raised| {
            let without = found.map(|person| Person { version: person.version - raised, ..person.clone() });
            Some((self.leads(before, without.as_ref())?, raised))
        })
    }

    /// The type of its event.
    pub(crate) fn event(&self, before: Option<&Person>) -> String {
        match self {
            Self::Create { .. } => "person.new".to_owned(),
            Self::Patch { .. } => "person.changed".to_owned(),
            Self::Delete => "person.deleted".to_owned(),
            Self::Add(item) => format!("{}.new", item.kind.name()),
            Self::Replace(_, item) => format!("{}.changed", item.kind.name()),
            Self::Remove(id) => {
                let item = before.and_then(|person| person.items.get(id));
                format!("{}.deleted", item.map_or("?", |item| item.kind.name()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_exact() {
        for (text, amount) in [
            ("0", Some(0)),
            ("1000", Some(10_000_000)),
            ("0.5", Some(5_000)),
            ("12.3400", Some(123_400)),
            ("12.34000000", Some(123_400)),
            ("0.00001", None),
            ("x", None),
        ] {
            assert_eq!(Amount::parse(text).map(|amount| amount.0), amount, "{text}");
        }
        assert_eq!(Amount(123_400).text(), "12.3400");
    }

    #[test]
    fn items_are_worth_what_the_contract_says() {
        let item = |kind, text| Item { kind, type_: None, value: Amount::parse(text).unwrap() };
        assert_eq!(item(ItemKind::Asset, "100000").points(), 5_000);
        assert_eq!(item(ItemKind::Income, "1000").points(), 20);
        assert_eq!(item(ItemKind::Debt, "1000").points(), -50);
        assert_eq!(item(ItemKind::Debt, "39.9999").points(), -1);
    }

    #[test]
    fn a_change_leads_from_one_state_to_one_other() {
        let id = Uuid::from_u128(1);
        let create = Change::Create { cpf: 1, name: "a".to_owned(), address: None };
        let person = create.apply(None, id).unwrap();
        assert_eq!(create.leads(None, Some(&person)), Some(id));
        let item = Item { kind: ItemKind::Debt, type_: None, value: Amount(1) };
        let add = Change::Add(item.clone());
        let more = Change::Add(item.clone()).apply(Some(&person), Uuid::from_u128(2)).unwrap();
        assert_eq!(Change::Add(item.clone()).leads(Some(&person), Some(&more)), Some(Uuid::from_u128(2)));
        let twice = Change::Add(item.clone()).apply(Some(&more), Uuid::from_u128(3)).unwrap();
        assert_eq!(Change::Add(item).leads(Some(&person), Some(&twice)), None, "two are not one");
        assert_eq!(Change::Delete.leads(Some(&person), None), Some(id));
        assert_eq!(Change::Delete.leads(Some(&person), Some(&person)), None);
        let raised = Person { version: more.version + 1, ..more.clone() };
        assert_eq!(add.leads_beside(Some(&person), Some(&raised), 0), None, "nobody republishes");
        assert_eq!(add.leads_beside(Some(&person), Some(&raised), 1), Some((Uuid::from_u128(2), 1)));
        assert_eq!((more.baselines_to(&raised, 1), more.baselines_to(&raised, 0)), (Some(1), None));
        assert_eq!(person.baselines_to(&raised, 2), None, "a baseline changes the version alone");
    }
}
