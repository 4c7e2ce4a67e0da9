//! Which measurements of the driver there are, and the rows that they make.
//!
//! | row | ours | peer |
//! |---|---|---|
//! | `driver/replay/qdN/cycles` | the driver's loop on a device that costs nothing, less that device | the bare loop there |
//! | `driver/replay/qdN/iops` | the same as reads a second of one core | |
//! | `driver/model/qdN/cycles` | the driver's loop on the model, less the model | the bare loop there |
//! | `driver/DEVICE/qdN/iops` | the driver on the device | the bare loop on the same device |
//! | `driver/DEVICE/qdN/cycles-with-waiting` | what the core spends on a read, polling in vain included | the bare loop |
//! | `driver/DEVICE/qd1/latency` | one read at a time | the bare loop: the device's own latency |
//! | `driver/DEVICE/qdN/kernel` | the driver on the device | the kernel's driver on the same namespace |
//! | `model/qdN/cycles` | what the model itself costs | |

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::clock::cycles_per_ns;
use crate::device::Device;
use crate::load::Buffers;
use crate::report::{Bar, Measurement, Row};
use crate::run;

/// Most cycles of the driver alone for a 4 KiB read at queue depth 128.
const CYCLES_MAX: f64 = 300.0;
/// Most that the driver may add to the latency of a device.
const LATENCY_RATIO_MAX: f64 = 1.05;
/// Completions that the replayed device has ready at a time.
const BATCH: usize = 32;
/// Faster than flash is.
const PACED: Duration = Duration::from_micros(5);

const BARE: &str = "bare loop on the same device";

/// How long, how deep, how often.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Queue depths.
    pub depths: Vec<u16>,
    /// Rounds of each side.
    pub rounds: usize,
    /// How long a round is busy.
    pub time: Duration,
    /// Whether the processor is emulated: then software is slow and waiting is not, and what a driver adds to a latency
    /// is not judged.
    pub emulated: bool,
    /// See [`Row::machine`].
    pub machine: String,
    /// Whether progress is told.
    pub tell: fn(&str),
}

/// The kernel's driver as a peer.
#[derive(Clone, Debug)]
pub struct KernelPeer {
    /// A block device on the same namespace.
    pub path: PathBuf,
    /// Whether its completions are polled.
    pub polled: bool,
}

/// Rounds of both sides, in nanoseconds a read, and the core's clock at each.
#[derive(Debug, Default)]
struct Pairs {
    ours: Vec<f64>,
    bare: Vec<f64>,
    clock: Vec<f64>,
}

impl Pairs {
    /// Each value in cycles, after `less` of the same round was taken away.
    fn cycles(values: &[f64], less: &[f64], clock: &[f64]) -> Vec<f64> {
        values.iter().zip(less).zip(clock).map(|((ns, less), clock)| (ns - less) * clock).collect()
    }
}

fn per_second(ns: &[f64]) -> Vec<f64> {
    ns.iter().map(|ns| 1e9 / ns).collect()
}

impl Plan {
    fn row(&self, rows: &mut Vec<Row>, measured: &Measurement<'_>) -> Result<()> {
        let row = Row::new(measured, &self.machine);
        let row = row.with_context(|| format!("{} was not measured", measured.name))?;
        (self.tell)(&row.to_string());
        rows.push(row);
        Ok(())
    }

    /// Rounds of the driver and of the bare loop in turns.
    fn pairs(&self, device: &mut Device, depth: u16, buffers: Buffers) -> Result<Pairs> {
        let mut pairs = Pairs::default();
        for round in 0..self.rounds {
            pairs.clock.push(cycles_per_ns());
            // Neither is always the first.
            if round % 2 == 0 {
                pairs.ours.push(run::ours(device, depth, buffers, self.time)?.ns);
                pairs.bare.push(run::bare(device, depth, self.time)?.ns);
            } else {
                pairs.bare.push(run::bare(device, depth, self.time)?.ns);
                pairs.ours.push(run::ours(device, depth, buffers, self.time)?.ns);
            }
        }
        Ok(pairs)
    }

    /// What the driver itself costs, on a device that costs next to nothing.
    ///
    /// # Errors
    /// When something does not work.
    pub fn replay(&self, rows: &mut Vec<Row>) -> Result<()> {
        for &depth in &self.depths {
            for (suffix, buffers, batch) in [
                ("", Buffers::Reused, BATCH),
                ("-pooled", Buffers::Pooled, BATCH),
                ("-one-by-one", Buffers::Reused, 1),
            ] {
                if depth == 1 && batch == 1 {
                    continue;
                }
                let mut device = Device::replay(batch)?;
                let pairs = self.pairs(&mut device, depth, buffers)?;
                let alone = (0..self.rounds).map(|_| run::replay_alone(depth, self.time));
                let alone = alone.collect::<Result<Vec<f64>>>()?;
                let bare = Pairs::cycles(&pairs.bare, &alone, &pairs.clock);
                self.row(
                    rows,
                    &Measurement {
                        name: format!("driver/replay/qd{depth}/cycles{suffix}"),
                        unit: "core cycles a read",
                        ours: &Pairs::cycles(&pairs.ours, &alone, &pairs.clock),
                        peer: Some((BARE, &bare)),
                        bar: (depth == 128).then_some(Bar::OursAtMost(CYCLES_MAX)),
                        method: "thread time of submit, doorbell and poll, less the replayed device's own, times the \
                                 core's clock",
                    },
                )?;
                if suffix.is_empty() {
                    self.row(
                        rows,
                        &Measurement {
                            name: format!("driver/replay/qd{depth}/iops"),
                            unit: "reads a second of one core",
                            ours: &per_second(&pairs.ours),
                            peer: Some((BARE, &per_second(&pairs.bare))),
                            bar: None,
                            method: "the same loop, nothing taken away",
                        },
                    )?;
                }
            }
        }
        Ok(())
    }

    /// The driver on the model, on one core with it.
    ///
    /// # Errors
    /// When something does not work.
    pub fn model(&self, rows: &mut Vec<Row>) -> Result<()> {
        for &depth in &self.depths {
            let mut device = Device::model()?;
            run::write_all(&mut device)?;
            let pairs = self.pairs(&mut device, depth, Buffers::Reused)?;
            // What the bare loop costs by itself is known from the replayed device.
            let (mut bare, mut model) = (Vec::new(), Vec::new());
            for on_model in &pairs.bare {
                let mut replay = Device::replay(BATCH)?;
                let loop_ns = run::bare(&mut replay, depth, self.time)?.ns;
                let own = loop_ns - run::replay_alone(depth, self.time)?;
                bare.push(own);
                model.push(on_model - own);
            }
            let bare = Pairs::cycles(&bare, &vec![0.0; bare.len()], &pairs.clock);
            self.row(
                rows,
                &Measurement {
                    name: format!("driver/model/qd{depth}/cycles"),
                    unit: "core cycles a read",
                    ours: &Pairs::cycles(&pairs.ours, &model, &pairs.clock),
                    peer: Some((BARE, &bare)),
                    bar: (depth == 128).then_some(Bar::OursAtMost(CYCLES_MAX)),
                    method: "thread time of driver and model, less the model's, which is the bare loop on the model less \
                             the bare loop's own",
                },
            )?;
            self.row(
                rows,
                &Measurement {
                    name: format!("model/qd{depth}/cycles"),
                    unit: "core cycles a read",
                    ours: &Pairs::cycles(&model, &vec![0.0; model.len()], &pairs.clock),
                    peer: None,
                    bar: None,
                    method: "the bare loop on the model less the bare loop's own",
                },
            )?;
            self.beside_bare(rows, &device.name, depth, &pairs, None)?;
        }
        if self.depths.contains(&1) {
            let mut device = Device::paced(PACED)?;
            run::write_all(&mut device)?;
            let pairs = self.pairs(&mut device, 1, Buffers::Reused)?;
            self.beside_bare(rows, &device.name, 1, &pairs, Some(Bar::RatioAtMost(LATENCY_RATIO_MAX)))?;
        }
        Ok(())
    }

    /// Reads a second, and latency at depth 1.
    fn beside_bare(
        &self,
        rows: &mut Vec<Row>,
        device: &str,
        depth: u16,
        pairs: &Pairs,
        bar: Option<Bar>,
    ) -> Result<()> {
        if depth == 1 {
            let us = |values: &[f64]| values.iter().map(|ns| ns / 1000.0).collect::<Vec<_>>();
            self.row(
                rows,
                &Measurement {
                    name: format!("driver/{device}/qd1/latency"),
                    unit: "us",
                    ours: &us(&pairs.ours),
                    peer: Some(("bare loop on the same device: its own latency", &us(&pairs.bare))),
                    bar,
                    method: "one read open at a time: the middle one, from submit to done; on the model in this process \
                             the mean of thread time",
                },
            )?;
        }
        self.row(
            rows,
            &Measurement {
                name: format!("driver/{device}/qd{depth}/iops"),
                unit: "reads a second of one core",
                ours: &per_second(&pairs.ours),
                peer: Some((BARE, &per_second(&pairs.bare))),
                bar: None,
                method: "driver, and the model where it is on the same core",
            },
        )
    }

    /// The driver on a device that works by itself, and the kernel's driver on the same namespace, if there is one.
    ///
    /// # Errors
    /// When something does not work.
    pub fn outside(
        &self,
        rows: &mut Vec<Row>,
        device: &mut Device,
        kernel: Option<&KernelPeer>,
    ) -> Result<()> {
        for &depth in &self.depths {
            let pairs = self.pairs(device, depth, Buffers::Reused)?;
            let judged = depth == 1 && !self.emulated;
            let bar = judged.then_some(Bar::RatioAtMost(LATENCY_RATIO_MAX));
            self.beside_bare(rows, &device.name.clone(), depth, &pairs, bar)?;
            if !self.emulated {
                self.with_waiting(rows, &device.name, depth, &pairs)?;
            }
            if let Some(kernel) = kernel {
                self.beside_kernel(rows, device, depth, kernel)?;
            }
        }
        Ok(())
    }

    /// What a core spends on a read of a device that works by itself: also what it polls in vain.
    fn with_waiting(&self, rows: &mut Vec<Row>, device: &str, depth: u16, pairs: &Pairs) -> Result<()> {
        let all = |values: &[f64]| Pairs::cycles(values, &vec![0.0; values.len()], &pairs.clock);
        self.row(
            rows,
            &Measurement {
                name: format!("driver/{device}/qd{depth}/cycles-with-waiting"),
                unit: "core cycles a read",
                ours: &all(&pairs.ours),
                peer: Some((BARE, &all(&pairs.bare))),
                bar: None,
                method: "time a read times the core's clock, polling in vain included: the device decides it",
            },
        )
    }

    fn beside_kernel(
        &self,
        rows: &mut Vec<Row>,
        device: &mut Device,
        depth: u16,
        kernel: &KernelPeer,
    ) -> Result<()> {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for round in 0..self.rounds {
            let kernel_round = || run::kernel(&kernel.path, depth, kernel.polled, self.time);
            if round % 2 == 1 {
                theirs.push(kernel_round()?.ns);
            }
            ours.push(run::ours(device, depth, Buffers::Reused, self.time)?.ns);
            if round % 2 == 0 {
                theirs.push(kernel_round()?.ns);
            }
        }
        let peer = if kernel.polled { "kernel driver, io_uring polled" } else { "kernel driver, io_uring" };
        self.row(
            rows,
            &Measurement {
                name: format!("driver/{}/qd{depth}/kernel", device.name),
                unit: "reads a second of one core",
                ours: &per_second(&ours),
                peer: Some((peer, &per_second(&theirs))),
                bar: None,
                method: "one thread each; the peer by io_uring with registered buffers and file",
            },
        )
    }

    /// Rejects what would give no numbers.
    ///
    /// # Errors
    /// With what is wrong.
    pub fn check(&self) -> Result<()> {
        if self.rounds == 0 || self.depths.is_empty() || self.depths.iter().any(|d| !(1..=1023).contains(d)) {
            bail!("there must be rounds, and depths from 1 to 1023");
        }
        Ok(())
    }
}
