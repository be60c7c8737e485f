//! The routes, and what stands before each of them: the login, the roles, the token of a form.

use std::{collections::HashMap, sync::Arc};

use poem::{
    Endpoint, EndpointExt, IntoResponse, Request, Response, Route, RouteMethod,
    endpoint::{make, make_sync},
    get,
    http::{HeaderValue, Method, StatusCode, header},
    post,
};
use subtle::ConstantTimeEq;
use url::form_urlencoded;
use web::{front::read_body, methods::only};

use crate::{
    Console,
    access::{Access, COOKIES, Role, SESSION_HOURS, User, is_from_elsewhere, is_secure},
    handlers::{Act, Done, View, act, query, show},
    page::{Refused, SCRIPT, STYLE, go_to, protect, respond},
    pages,
};

/// Served to everybody: nothing of an outbox is in it.
const OPEN: [&str; 5] = ["/login", "/style.css", "/refresh.js", daemon::health::LIVE, daemon::health::READY];

/// The fields of a form that was posted. Its token was right.
#[derive(Clone, Default)]
pub struct Form(Arc<HashMap<String, String>>);

impl Form {
    /// A field; empty where there is none.
    pub fn field(&self, name: &str) -> &str {
        self.0.get(name).map_or("", |value| value.trim())
    }

    fn parse(body: &[u8]) -> Self {
        Self(Arc::new(form_urlencoded::parse(body).into_owned().collect()))
    }
}

/// All pages.
pub fn routes(
    console: &Arc<Console>,
    add_health: impl FnOnce(Route) -> Route,
) -> impl Endpoint<Output = Response> + 'static {
    let page = |view| route(console, Some(view), None);
    let action = |action| route(console, None, Some(action));
    let routes = Route::new()
        .at("/", page(View::All))
        .at("/outbox/:name", page(View::Outbox))
        .at("/outbox/:name/doctor", page(View::Doctor))
        .at("/outbox/:name/parked", route(console, Some(View::Parked), Some(Act::Parked)))
        .at("/outbox/:name/pause", action(Act::Pause))
        .at("/outbox/:name/resume", action(Act::Resume))
        .at("/outbox/:name/body", action(Act::Body))
        .at("/job/:name", page(View::Job))
        .at("/job/:name/stop", action(Act::StopJob))
        .at("/inbox/:name", page(View::Inbox))
        .at("/inbox/:name/redrive", action(Act::Redrive))
        .at("/inbox/:name/stop", action(Act::StopRequest))
        .at("/find", page(View::Find))
        .at("/audit", page(View::Audit))
        .at("/login", login(&console.access))
        .at("/logout", log_out(&console.access))
        .at("/style.css", asset("text/css; charset=utf-8", STYLE))
        .at("/refresh.js", asset("text/javascript; charset=utf-8", SCRIPT));
    let access = console.access.clone();
    add_health(routes).around(move |next, request| guard(next, request, access.clone()))
}

/// Shows a page, and does what a form asks for.
fn route(
    console: &Arc<Console>,
    view: Option<View>,
    action: Option<Act>,
) -> impl Endpoint<Output = Response> + 'static {
    let shown = view.map(|view| {
        let console = Arc::clone(console);
        make(move |request: Request| {
            let console = Arc::clone(&console);
            async move {
                let Some(user) = request.data::<User>() else {
                    return StatusCode::UNAUTHORIZED.into_response();
                };
                let name = request.raw_path_param("name").unwrap_or_default();
                match show(&console, view, name, &request, user).await {
                    Ok(page) => respond(StatusCode::OK, &page, Some(user)),
                    Err(refused) => respond(refused.status, &refused.page(), Some(user)),
                }
            }
        })
    });
    let done = action.map(|action| {
        let console = Arc::clone(console);
        make(move |request: Request| {
            let console = Arc::clone(&console);
            async move {
                let (user, form) = (request.data::<User>().cloned(), request.data::<Form>().cloned());
                let (Some(user), Some(form)) = (user, form) else {
                    return StatusCode::UNAUTHORIZED.into_response();
                };
                let name = request.raw_path_param("name").unwrap_or_default().to_owned();
                // A client that hangs up must not cut a change in two.
                let of_user = user.clone();
                let work = tokio::spawn(async move { act(&console, action, &name, &form, &of_user).await });
                match work.await {
                    Ok(Ok(Done::GoTo(path))) => go_to(&path),
                    Ok(Ok(Done::Page(page))) => respond(StatusCode::OK, &page, Some(&user)),
                    Ok(Err(refused)) => respond(refused.status, &refused.page(), Some(&user)),
                    Err(_panicked) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
                }
            }
        })
    });
    match (shown, done) {
        (Some(shown), Some(done)) => only("GET, HEAD, POST", get(shown).post(done)),
        (Some(shown), None) => only("GET, HEAD", get(shown)),
        (None, Some(done)) => only("POST", post(done)),
        (None, None) => only("", RouteMethod::new()),
    }
}

fn asset(media_type: &'static str, text: &'static str) -> impl Endpoint<Output = Response> + 'static {
    let respond = make_sync(move |_: Request| {
        Response::builder().content_type(media_type).header(header::CACHE_CONTROL, "max-age=300").body(text)
    });
    only("GET, HEAD", get(respond))
}

fn login(access: &Access) -> impl Endpoint<Output = Response> + 'static {
    let access = access.clone();
    let form = make_sync(|request: Request| {
        let to = query(&request, "to");
        respond(StatusCode::OK, &pages::login::page(pages::login::target(&to), false), None)
    });
    let try_key = make(move |request: Request| {
        let access = access.clone();
        async move {
            let form = request.data::<Form>().cloned().unwrap_or_default();
            let to = pages::login::target(form.field("to"));
            let Some(token) = access.log_in(form.field("key")) else {
                return respond(StatusCode::FORBIDDEN, &pages::login::page(to, true), None);
            };
            let mut response = go_to(to);
            set_cookie(&mut response, is_secure(request.headers()), token.as_str(), SESSION_HOURS * 3_600);
            response
        }
    });
    only("GET, HEAD, POST", get(form).post(try_key))
}

fn log_out(access: &Access) -> impl Endpoint<Output = Response> + 'static {
    let access = access.clone();
    let end = make_sync(move |request: Request| {
        access.log_out(&request);
        let mut response = go_to("/login");
        set_cookie(&mut response, is_secure(request.headers()), "", 0);
        response
    });
    only("POST", post(end))
}

fn set_cookie(response: &mut Response, secure: bool, value: &str, seconds: u64) {
    let (name, secure) = if secure { (COOKIES[0], "; Secure") } else { (COOKIES[1], "") };
    let cookie = format!("{name}={value}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Strict{secure}");
    if let Ok(cookie) = HeaderValue::from_str(&cookie) {
        response.headers_mut().append(header::SET_COOKIE, cookie);
    }
}

/// Before every route: a user, a role for what changes something, and the token of a form.
async fn guard(
    next: Arc<impl Endpoint<Output = Response>>,
    request: Request,
    access: Access,
) -> poem::Result<Response> {
    let user = access.user(&request);
    let mut response = match admitted(request, user.as_ref()).await {
        Err(response) => response,
        Ok(request) => match next.call(request).await {
            Ok(response) => response,
            // The front logs it, and says nothing of it.
            Err(error) if error.status().is_server_error() => return Err(error),
            Err(error) => {
                let text = match error.status() {
                    StatusCode::METHOD_NOT_ALLOWED => "This page does not take this method.".to_owned(),
                    _ => Refused::unknown().text,
                };
                let refused = Refused::new(error.status(), text);
                let allow = error.into_response().headers_mut().remove(header::ALLOW);
                let mut response = respond(refused.status, &refused.page(), user.as_ref());
                response.headers_mut().extend(allow.map(|allow| (header::ALLOW, allow)));
                response
            }
        },
    };
    protect(response.headers_mut());
    Ok(response)
}

/// The request with its user and its form; or the response to one that is not admitted.
async fn admitted(mut request: Request, user: Option<&User>) -> Result<Request, Response> {
    let refuse = |status, text: &str| respond(status, &Refused::new(status, text).page(), user);
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let Some(user) = user.cloned() else {
        if !OPEN.contains(&path.as_str()) {
            let wants_page = request
                .headers()
                .get_all(header::ACCEPT)
                .iter()
                .any(|a| a.as_bytes().starts_with(b"text/html"));
            if method.is_safe() && wants_page {
                let to = request.uri().path_and_query().map_or("/", |to| to.as_str());
                let to: String = form_urlencoded::byte_serialize(to.as_bytes()).collect();
                return Err(go_to(&format!("/login?to={to}")));
            }
            let mut response = refuse(
                StatusCode::UNAUTHORIZED,
                "This needs a key that has a role. Log in, or send it as Authorization: Bearer.",
            );
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            return Err(response);
        }
        return with_form(request, None, &method).await;
    };
    if method != Method::GET
        && method != Method::HEAD
        && path != "/login"
        && path != "/logout"
        && user.role < Role::Act
    {
        let text = "Your role may look, and not act. Roles stand in the table [role] of the console's file.";
        return Err(refuse(StatusCode::FORBIDDEN, text));
    }
    request.set_data(user.clone());
    with_form(request, Some(&user), &method).await
}

async fn with_form(mut request: Request, user: Option<&User>, method: &Method) -> Result<Request, Response> {
    if method.is_safe() {
        return Ok(request);
    }
    let refuse = |status, text: &str| respond(status, &Refused::new(status, text).page(), user);
    if is_from_elsewhere(method, request.headers()) {
        return Err(refuse(StatusCode::FORBIDDEN, "This form was sent by a page of another site."));
    }
    let body = request.take_body();
    let body = read_body(&request, body).await.map_err(IntoResponse::into_response)?;
    let form = Form::parse(&body);
    let expected = user.and_then(|user| user.form_token.as_deref());
    let is_login = request.uri().path() == "/login";
    if let Some(expected) = expected
        && !is_login
        && !bool::from(expected.as_bytes().ct_eq(form.field("token").as_bytes()))
    {
        let text = "This form is of an earlier session. Load the page again, and repeat what you did.";
        return Err(refuse(StatusCode::FORBIDDEN, text));
    }
    request.set_data(form);
    Ok(request)
}
