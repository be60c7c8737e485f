//! Items of a person, of any kind.

use std::{collections::HashMap, marker::PhantomData};

use poem::{Request, endpoint::BoxEndpoint, http::Method};
use poem_openapi::{
    OpenApi,
    registry::{MetaApi, Registry},
};
use service::documentation::{Answer, Failure, Held, Sent};

use super::Api;
use crate::{
    answer::{self, Changed, Created, Deleted, List},
    describe::NewItemBody,
    kind::ItemKind,
    problems::{AddItem, ChangeItem, DeleteItem, ReadItem, ReadPerson},
    request::{self, After, Body, IdempotencyKey, IfMatch, Item, ItemId, Limit, Page, PathCpf},
    store::{Change, Refused, idempotency::Added},
};

/// [`Items`], as the documentation names them: what is said of an item is said of an income, an asset or a debt.
#[derive(Clone, Debug)]
pub(super) struct OfKind<K>(pub(super) Items<K>);

impl<K: ItemKind> OpenApi for OfKind<K> {
    fn meta() -> Vec<MetaApi> {
        // poem-openapi wants texts that live for ever. These are few, and made once.
        let named = |text: &'static str| -> &'static str {
            text.replace("an item", K::ONE).replace("{kind}", &K::KIND.to_string()).leak()
        };
        let mut apis = Items::<K>::meta();
        for operation in apis.iter_mut().flat_map(|api| &mut api.paths).flat_map(|path| &mut path.operations)
        {
            operation.summary = operation.summary.map(named);
            operation.description = operation.description.map(named);
        }
        apis
    }

    fn register(registry: &mut Registry) {
        Items::<K>::register(registry);
    }

    fn add_routes(self, routes: &mut HashMap<String, HashMap<Method, BoxEndpoint<'static>>>) {
        self.0.add_routes(routes);
    }
}

/// The operations on items of one kind.
#[derive(Clone, Debug)]
pub(super) struct Items<K>(Api, PhantomData<K>);

impl<K> Items<K> {
    pub(super) fn new(api: Api) -> Self {
        Self(api, PhantomData)
    }
}

#[OpenApi(prefix_path = K::PATH, tag = "K::TAG")]
impl<K: ItemKind> Items<K> {
    /// Add an item to a person
    ///
    /// Event: `{kind}.new`.
    #[oai(path = "/", method = "post")]
    async fn add(
        &self,
        request: &Request,
        cpf: Sent<PathCpf>,
        #[oai(name = "If-Match")] if_match: Sent<IfMatch>,
        #[oai(name = "Idempotency-Key")] key: Sent<IdempotencyKey>,
        body: Body<NewItemBody<K>>,
    ) -> Result<Answer<Created>, Failure<AddItem>> {
        let (whose, new, key) = Item::parse_new(request, K::KIND, cpf, (if_match, key), &body.0)?;
        let place = format!("{}/{}", answer::location(whose.0), K::KIND);
        let keyed = key.map(|key| key.of(request, place.clone(), &body.0));
        let (store, location) = (self.0.store.clone(), place.clone());
        let added = self.0.write(async move { store.add_item(K::SQL, whose, new, place, keyed).await });
        match added.await?? {
            Added::Stored(written) => Ok(answer::created(&written, format!("{location}/{}", written.id))),
            Added::Before(answer) => Ok(answer::again(answer)),
            Added::Refused(refused) => Err(refused.into()),
        }
    }

    /// Read a person's items, page by page
    ///
    /// In the order in which they came. `next` leads from page to page; items that come or go meanwhile
    /// neither repeat others nor leave them out.
    #[oai(path = "/", method = "get")]
    async fn list(
        &self,
        request: &Request,
        cpf: Sent<PathCpf>,
        limit: Sent<Limit>,
        after: Sent<After>,
        #[oai(name = "If-None-Match")] _held: Sent<Held>,
    ) -> Result<Answer<List<K>>, Failure<ReadPerson>> {
        let (cpf, page) = Page::parse(request, cpf, limit, after)?;
        let listed = self.0.store.items(K::SQL, cpf, page).await?.ok_or(Refused::UnknownPerson)?;
        Ok(answer::list(request, cpf, page, &listed)?)
    }

    /// Read an item
    ///
    /// Its `ETag` is that of the person.
    #[oai(path = "/:id", method = "get")]
    async fn read(
        &self,
        request: &Request,
        cpf: Sent<PathCpf>,
        id: Sent<ItemId>,
        #[oai(name = "If-None-Match")] _held: Sent<Held>,
    ) -> Result<Answer<answer::Item<K>>, Failure<ReadItem>> {
        let ((cpf, id), _) = request::item(request, cpf, id, None)?;
        Ok(answer::item(request, self.0.store.item(K::SQL, cpf, id).await??)?)
    }

    /// Replace an item
    ///
    /// The whole of it. Creates none: POST does. Event: `{kind}.changed`, unless it was so already.
    #[oai(path = "/:id", method = "put")]
    async fn change(
        &self,
        request: &Request,
        cpf: Sent<PathCpf>,
        id: Sent<ItemId>,
        #[oai(name = "If-Match")] if_match: Sent<IfMatch>,
        body: Body<NewItemBody<K>>,
    ) -> Result<Answer<Changed>, Failure<ChangeItem>> {
        let (place, states, item) = Item::parse(request, K::KIND, (cpf, id), if_match, &body.0)?;
        let store = self.0.store.clone();
        let change = self.0.write(async move { store.change_item(K::SQL, place, states, item).await });
        Ok(answer::changed(&change.await???))
    }

    /// Delete an item
    ///
    /// Event: `{kind}.deleted`, with the record as it was last.
    #[oai(path = "/:id", method = "delete")]
    async fn delete(
        &self,
        request: &Request,
        cpf: Sent<PathCpf>,
        id: Sent<ItemId>,
        #[oai(name = "If-Match")] if_match: Sent<IfMatch>,
    ) -> Result<Answer<Deleted>, Failure<DeleteItem>> {
        let (place, states) = request::item(request, cpf, id, Some(if_match))?;
        let store = self.0.store.clone();
        let deleted = self.0.write(async move { store.delete_item(K::SQL, place, states).await });
        let (Change::Changed(written) | Change::Unchanged(written)) = deleted.await???;
        Ok(answer::deleted(&written))
    }
}
