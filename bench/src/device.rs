//! The devices that can be measured, and how each is made to work.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use async_nvme::access::Access;
use nvme_model::{ControllerOptions, Model, NamespaceOptions, Subsystem};

use crate::paced::Paced;
use crate::replay::{Player, Replay};

/// Blocks of the namespace of the model: 1 MiB. The model copies each block twice; from larger ones it would wait for
/// memory most of the time, and that time varies by more than what a driver costs.
const MODEL_BLOCKS: u64 = 1 << 8;
const MODEL_BLOCK_SHIFT: u8 = 12;

/// A controller to be driven.
#[derive(Debug)]
pub struct Device {
    /// Names it in the report.
    pub name: String,
    access: Arc<dyn Access>,
    nsid: u32,
    works: Works,
}

/// Who lets it work.
#[derive(Debug)]
enum Works {
    /// It has a processor of its own.
    ByItself,
    /// Whoever uses it, on the same core.
    Model(Arc<Model>),
    /// The same; its completions are prepared.
    Replay { replay: Arc<Replay>, model: Arc<Model>, player: Option<Player>, batch: usize },
    /// The same, after a latency.
    Paced(Arc<Paced>),
}

/// The model over memory, which was never written.
///
/// # Errors
/// When there is no memory for it.
pub fn memory_model() -> Result<Arc<Model>> {
    let subsystem = Subsystem::new("BENCH");
    subsystem.add_namespace(NamespaceOptions::memory(1, MODEL_BLOCK_SHIFT, MODEL_BLOCKS))?;
    Ok(subsystem.controller(ControllerOptions::default()))
}

impl Device {
    /// A device that is reached by `access` and works by itself.
    #[must_use]
    pub fn outside(name: &str, access: Arc<dyn Access>, nsid: u32) -> Self {
        Self { name: name.to_owned(), access, nsid, works: Works::ByItself }
    }

    /// The model in this process, over memory.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn model() -> Result<Self> {
        let model = memory_model()?;
        Ok(Self { name: "model".to_owned(), access: model.clone(), nsid: 1, works: Works::Model(model) })
    }

    /// A device whose completions are prepared, `batch` at a time.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn replay(batch: usize) -> Result<Self> {
        let model = memory_model()?;
        let replay = Replay::new(model.clone());
        let works = Works::Replay { replay: replay.clone(), model, player: None, batch };
        Ok(Self { name: "replay".to_owned(), access: replay, nsid: 1, works })
    }

    /// The model, which learns of each doorbell after `latency`.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn paced(latency: Duration) -> Result<Self> {
        let paced = Paced::new(memory_model()?, latency);
        let name = format!("model-{}us", latency.as_micros());
        Ok(Self { name, access: paced.clone(), nsid: 1, works: Works::Paced(paced) })
    }

    /// The way to it.
    #[must_use]
    pub fn access(&self) -> Arc<dyn Access> {
        self.access.clone()
    }

    /// The namespace to read.
    #[must_use]
    pub const fn nsid(&self) -> u32 {
        self.nsid
    }

    /// Whether it works on the core of the driver: then only the time that the thread ran counts, for nobody waits.
    #[must_use]
    pub const fn is_inside(&self) -> bool {
        matches!(self.works, Works::Model(_) | Works::Replay { .. })
    }

    /// Lets it work while it is being started or stopped.
    pub fn idle(&mut self) {
        match &mut self.works {
            Works::ByItself => std::hint::spin_loop(),
            Works::Model(model) => _ = model.step(),
            Works::Paced(paced) => paced.idle(),
            Works::Replay { model, player, .. } => {
                if let Some(player) = player {
                    player.play(usize::MAX);
                }
                model.step();
            }
        }
    }

    /// To be called when a queue pair is open: what stands in for the device's processor takes it over.
    ///
    /// # Errors
    /// When the queue pair was not seen.
    pub fn opened(&mut self) -> Result<()> {
        if let Works::Replay { replay, player, .. } = &mut self.works {
            *player = Some(replay.player().context("the replayed device saw no queue pair")?);
        }
        Ok(())
    }

    /// To be called when the queue pair is closed.
    pub fn closed(&mut self) {
        if let Works::Replay { player, .. } = &mut self.works {
            *player = None;
        }
    }

    /// Lets it work on reads.
    #[inline]
    pub fn work(&mut self) {
        match &mut self.works {
            Works::ByItself => {}
            Works::Model(model) => _ = model.step(),
            Works::Replay { player: Some(player), batch, .. } => _ = player.play(*batch),
            Works::Paced(paced) => paced.work(),
            Works::Replay { .. } => {}
        }
    }

    /// Has the replayed device complete `count` entries of its ring, new or not: what it costs by itself.
    pub fn complete_alone(&mut self, count: usize) {
        if let Works::Replay { player: Some(player), .. } = &mut self.works {
            player.play_alone(count);
        }
    }
}
