//! Over real sockets: events arrive in order, and what was missed is replayed.

#![cfg(feature = "zmq")]
#![allow(clippy::unwrap_used, clippy::panic)]

use std::time::Duration;

use block_pool::BlockPool;
use block_table::BlockTable;
use bytes::Bytes;
use kv_events::{PublishError, Publisher};
use zeromq::{DealerSocket, Socket, SocketRecv, SocketSend, SubSocket, ZmqMessage};

fn compute(pool: &BlockPool, tokens: std::ops::Range<u32>) {
    let mut table = BlockTable::new(pool);
    table.reserve(tokens.len()).unwrap();
    table.commit_tokens(&tokens.collect::<Vec<_>>()).unwrap();
}

fn number(frame: &Bytes) -> i64 {
    i64::from_be_bytes(frame[..].try_into().unwrap())
}

#[tokio::test]
async fn a_subscriber_follows_and_recovers() {
    let pool = BlockPool::new(64, 2).unwrap();
    compute(&pool, 0..4);
    let publisher = Publisher::builder("tcp://127.0.0.1:0")
        .replay_endpoint("tcp://127.0.0.1:0")
        .topic("kv@engine@model")
        .data_parallel_rank(3)
        .start(&pool)
        .unwrap();
    let mut subscriber = SubSocket::new();
    subscriber.connect(publisher.endpoint()).await.unwrap();
    subscriber.subscribe("kv@").await.unwrap();
    // Until the subscription has arrived, what is published is lost.
    let mut live = Vec::new();
    for i in 1.. {
        compute(&pool, 100 * i..100 * i + 4);
        match tokio::time::timeout(Duration::from_millis(200), subscriber.recv()).await {
            Ok(message) => live.push(message.unwrap().into_vec()),
            Err(_) => assert!(i < 100, "nothing arrives"),
        }
        if live.len() == 3 {
            break;
        }
    }
    for (message, next) in live.iter().zip(&live[1..]) {
        assert_eq!(message[0], "kv@engine@model");
        assert_eq!(number(&message[1]) + 1, number(&next[1]));
    }

    // The batch with what was cached when publishing began is number 0.
    let mut dealer = DealerSocket::new();
    dealer.connect(publisher.replay_endpoint().unwrap()).await.unwrap();
    let request = vec![Bytes::new(), Bytes::copy_from_slice(&0u64.to_be_bytes())];
    dealer.send(ZmqMessage::try_from(request).unwrap()).await.unwrap();
    let mut replayed = Vec::new();
    loop {
        let answer = tokio::time::timeout(Duration::from_secs(10), dealer.recv()).await.unwrap().unwrap().into_vec();
        if number(&answer[2]) == -1 {
            assert!(answer[1].is_empty() && answer[3].is_empty());
            break;
        }
        assert_eq!((number(&answer[2]), &answer[1][..]), (replayed.len() as i64, &b"kv@engine@model"[..]));
        replayed.push(answer[3].clone());
    }
    for message in &live {
        assert_eq!(replayed[number(&message[1]) as usize], message[2]);
    }
    // An array of three: a time, an array of events, the rank.
    assert_eq!((replayed[0][0], replayed[0].last()), (0x93, Some(&3)));
}

/// Long enough for whatever happens at all.
const PATIENCE: Duration = Duration::from_secs(10);

#[test]
fn an_endpoint_that_is_taken_is_an_error() {
    let pool = BlockPool::new(4, 2).unwrap();
    let publisher = Publisher::builder("tcp://127.0.0.1:0").start(&pool).unwrap();
    assert_eq!(publisher.replay_endpoint(), None);
    let free = "tcp://127.0.0.1:0";
    for (publish, replay) in [(publisher.endpoint(), free), (free, publisher.endpoint())] {
        let taken = Publisher::builder(publish).replay_endpoint(replay).start(&pool).unwrap_err();
        assert!(matches!(&taken, PublishError::Bind { endpoint, .. } if endpoint == publisher.endpoint()), "{taken}");
    }
    for wrong in ["", "5557", "udp://127.0.0.1:5557"] {
        assert!(matches!(Publisher::builder(wrong).start(&pool), Err(PublishError::Bind { .. })), "{wrong}");
    }
}

#[tokio::test]
async fn a_star_is_every_address() {
    let pool = BlockPool::new(4, 2).unwrap();
    let publisher = Publisher::builder("tcp://*:0").replay_endpoint("tcp://*:0").start(&pool).unwrap();
    for endpoint in [Some(publisher.endpoint()), publisher.replay_endpoint()] {
        let (_, port) = endpoint.unwrap().rsplit_once(':').unwrap();
        std::net::TcpStream::connect(("127.0.0.1", port.parse::<u16>().unwrap())).unwrap();
    }
}

#[tokio::test]
async fn peers_that_do_not_read_hold_up_nobody() {
    let pool = BlockPool::new(1024, 2).unwrap();
    let publisher = Publisher::builder("tcp://127.0.0.1:0").replay_endpoint("tcp://127.0.0.1:0").start(&pool).unwrap();
    let mut reads_not = SubSocket::new();
    reads_not.connect(publisher.endpoint()).await.unwrap();
    reads_not.subscribe("").await.unwrap();
    // Some hundred batches.
    for i in 0..200 {
        compute(&pool, 10 * i..10 * i + 2);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    // More answers than there is room for.
    let mut asks_only = DealerSocket::new();
    asks_only.connect(publisher.replay_endpoint().unwrap()).await.unwrap();
    for _ in 0..1500 {
        let request = vec![Bytes::new(), Bytes::copy_from_slice(&0u64.to_be_bytes())];
        asks_only.send(ZmqMessage::try_from(request).unwrap()).await.unwrap();
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let mut subscriber = SubSocket::new();
    subscriber.connect(publisher.endpoint()).await.unwrap();
    subscriber.subscribe("").await.unwrap();
    let arrives = async {
        for i in 1000.. {
            compute(&pool, 10 * i..10 * i + 2);
            if tokio::time::timeout(Duration::from_millis(50), subscriber.recv()).await.is_ok() {
                return;
            }
        }
    };
    let arrived = tokio::time::timeout(PATIENCE, arrives).await;
    // In a thread, so that the test ends even if this does not.
    let (dropped, drops) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        drop(publisher);
        dropped.send(())
    });
    assert_eq!((arrived, drops.recv_timeout(PATIENCE)), (Ok(()), Ok(())));
}
