//! A TCP proxy before the database, so that a test can take the database away and give it back without
//! touching the server, which others use.

use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

pub(crate) struct Proxy {
    pub(crate) port: u16,
    target: String,
    open: CancellationToken,
    task: Option<tokio::task::JoinHandle<()>>,
}

impl Proxy {
    pub(crate) async fn new(target: String) -> Self {
        // None of those that the system gives to outgoing connections: it is to be had again after a cut.
        let port = devstack::ports::free();
        let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
        let open = CancellationToken::new();
        let task = Some(tokio::spawn(forward(listener, target.clone(), open.clone())));
        Self { port, target, open, task }
    }

    /// Closes every connection; new ones are refused.
    pub(crate) async fn cut(&mut self) {
        self.open.cancel();
        self.task.take().unwrap().await.unwrap();
    }

    /// Takes connections again.
    pub(crate) async fn resume(&mut self) {
        let listener = TcpListener::bind(("127.0.0.1", self.port)).await.unwrap();
        self.open = CancellationToken::new();
        self.task = Some(tokio::spawn(forward(listener, self.target.clone(), self.open.clone())));
    }
}

async fn forward(listener: TcpListener, target: String, open: CancellationToken) {
    while let Some(Ok((mut near, _))) = open.run_until_cancelled(listener.accept()).await {
        let (target, open) = (target.clone(), open.clone());
        tokio::spawn(async move {
            let both = async {
                let mut far = TcpStream::connect(&target).await?;
                tokio::io::copy_bidirectional(&mut near, &mut far).await
            };
            open.run_until_cancelled(both).await
        });
    }
}
