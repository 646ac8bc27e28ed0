//! The routing table of the moment: published by [`crate::actor`], read by whoever routes, who can wait for the next.
//!
//! Those who wait are woken in the order in which they began to. tokio's `watch` draws lots instead, from a source that
//! no seed reaches: requests that react to one table would do so in another order in each run of a simulation.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::route::RoutingTable;

/// A reader, and the publisher's end: clones show the same table.
#[derive(Debug, Clone)]
pub struct Tables {
    shared: Arc<Shared>,
    /// The last one that this reader has seen.
    seen: u64,
}

#[derive(Debug)]
struct Shared {
    /// The table and how many came before it.
    present: Mutex<(u64, Arc<RoutingTable>)>,
    bell: Notify,
}

// === impl Tables ===

impl Tables {
    /// The first table.
    pub fn new(first: RoutingTable) -> Self {
        let present = Mutex::new((0, Arc::new(first)));
        Self { shared: Arc::new(Shared { present, bell: Notify::new() }), seen: 0 }
    }

    /// Replaces the table.
    pub fn publish(&self, next: RoutingTable) {
        {
            let mut present = self.present();
            *present = (present.0 + 1, Arc::new(next));
        }
        self.shared.bell.notify_waiters();
    }

    /// The table of this moment.
    pub fn borrow(&self) -> Arc<RoutingTable> {
        self.present().1.clone()
    }

    /// As [`Self::borrow`]; [`Self::changed`] waits for a later one.
    pub fn borrow_and_update(&mut self) -> Arc<RoutingTable> {
        let (number, table) = self.present().clone();
        self.seen = number;
        table
    }

    /// Ends when there is a table that this reader has not seen. Dropping the future loses nothing.
    pub async fn changed(&mut self) {
        loop {
            // It hears what is published from here on, so that nothing is missed between the look and the wait.
            let rung = self.shared.bell.notified();
            let number = self.present().0;
            if number != self.seen {
                self.seen = number;
                return;
            }
            rung.await;
        }
    }

    /// A panic under this short lock leaves nothing half-done.
    fn present(&self) -> MutexGuard<'_, (u64, Arc<RoutingTable>)> {
        self.shared.present.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::membership::ClusterView;
    use crate::ring::RingKey;
    use crate::route::Routes;

    fn table(epoch: u64) -> RoutingTable {
        let view = ClusterView { epoch, me: "n0".parse().expect("a valid name"), members: Default::default() };
        Routes::new(RingKey::derive(b"test")).table(Arc::new(view))
    }

    #[tokio::test]
    async fn who_waits_first_is_woken_first_and_nobody_misses_a_table() {
        let tables = Tables::new(table(1));
        let woken: Arc<Mutex<Vec<usize>>> = Arc::default();
        let waits: Vec<_> = (0..50)
            .map(|i| {
                let (mut tables, woken) = (tables.clone(), woken.clone());
                tokio::spawn(async move {
                    tables.changed().await;
                    woken.lock().expect("no panic").push(i);
                    tables.borrow_and_update().epoch()
                })
            })
            .collect();
        tokio::task::yield_now().await;
        tables.publish(table(2));
        for wait in waits {
            assert_eq!(wait.await.expect("no panic"), 2);
        }
        assert_eq!(*woken.lock().expect("no panic"), (0..50).collect::<Vec<_>>());
        let mut late = tables.clone();
        late.changed().await;
        assert_eq!(late.borrow().epoch(), 2, "published before it looked");
    }
}
