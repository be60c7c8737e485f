//! Items of a person, of any kind.

use std::marker::PhantomData;

use poem_openapi::OpenApi;
use service::documentation::{Answer, Failure, Sent};

use super::Api;
use crate::{
    answer::{self, Created},
    describe::NewItemBody,
    kind::ItemKind,
    problems::{AddItem, UNKNOWN_PERSON},
    request::{Body, NewItem, PathCpf},
};

/// The operations on items of one kind.
#[derive(Clone, Debug)]
pub(super) struct Items<K>(Api, PhantomData<K>);

impl<K> Items<K> {
    pub(super) fn new(api: Api) -> Self {
        Self(api, PhantomData)
    }
}

#[OpenApi(prefix_path = K::PATH)]
impl<K: ItemKind> Items<K> {
    /// Add an item to a person
    ///
    /// Event: `income.new`, `asset.new` or `debt.new`.
    #[oai(path = "/", method = "post")]
    async fn add(
        &self,
        cpf: Sent<PathCpf>,
        body: Body<NewItemBody<K>>,
    ) -> Result<Answer<Created>, Failure<AddItem>> {
        let (PathCpf(cpf), new) = NewItem::parse(K::KIND, cpf, &body.0)?;
        let store = self.0.store.clone();
        let written = self.0.write(async move { store.add_item(cpf, new).await }).await??;
        let written = written.ok_or(&UNKNOWN_PERSON)?;
        Ok(answer::created(&written, format!("/person/{}/{}/{}", cpf.get(), K::KIND, written.id)))
    }
}
