//! A proxy before the broker, which can be away for a while.

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
};

pub(crate) struct Proxy {
    port: u16,
    there: watch::Sender<bool>,
}

/// `host:port` of a URL.
fn host(url: &str) -> &str {
    url.rsplit_once('@').unwrap().1.split('/').next().unwrap()
}

impl Proxy {
    pub(crate) async fn before(url: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (there, is_there) = watch::channel(true);
        let server = host(url).to_owned();
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let (server, mut is_there) = (server.clone(), is_there.clone());
                tokio::spawn(async move {
                    let Ok(mut server) = TcpStream::connect(server).await else { return };
                    // Both connections end with this task.
                    tokio::select! {
                        _ = is_there.wait_for(|there| !there) => {}
                        _ = copy_bidirectional(&mut client, &mut server) => {}
                    }
                });
            }
        });
        Self { port, there }
    }

    /// The URL with the proxy in place of the broker.
    pub(crate) fn url(&self, url: &str) -> String {
        url.replace(host(url), &format!("127.0.0.1:{}", self.port))
    }

    /// While it is away, it cuts every connection.
    pub(crate) fn be_there(&self, there: bool) {
        self.there.send_replace(there);
    }
}
