// pg-boss, with the loop its documentation shows for fetch(): take a large batch, write it to the stream in one pipeline,
// delete it in one statement, which is faster than complete(). The queue has a table of its own, as large queues should.
// fetch()'s options against sorting (priority, orderByCreatedOn) are not used, because this version ignores them.
// The first argument is the policy of the queue: `standard`, or `key_strict_fifo`, which promises order per key.
// https://pgboss.io/api/jobs (insert, fetch, deleteJob), https://pgboss.io/api/queues (partition, policy)
import { setTimeout } from 'node:timers/promises'
import { PgBoss } from 'pg-boss'
import { createClient } from 'redis'

const { DATABASE_URL, REDIS_URL, EVENTS, PAYLOAD, KEYS } = process.env
const [policy, action] = process.argv.slice(2)
const events = Number(EVENTS)
const queue = 'events'
const loops = 4, batchSize = 2000 // the fastest of those tried; the documentation names none

// Schedules and maintenance are off, because they would take time from the drain.
const boss = new PgBoss({ connectionString: DATABASE_URL, supervise: false, schedule: false })
boss.on('error', error => { throw error })

async function fill () {
  await boss.createQueue(queue, { partition: true, policy })
  const pad = 'x'.repeat(Math.max(Number(PAYLOAD) - 30, 0))
  // An insert has each key at most once: all its jobs have the same time, so two jobs of a key would have no order.
  const bulk = Math.min(10_000, Number(KEYS))
  for (let first = 1; first <= events; first += bulk) {
    const jobs = []
    for (let n = first; n < first + bulk && n <= events; n++) {
      const key = `order:${n % Number(KEYS)}`
      const data = { type: 'order.created', key, data: { n, pad } }
      jobs.push(policy === 'standard' ? { data } : { data, singletonKey: key })
    }
    await boss.insert(queue, jobs)
  }
}

async function drain () {
  const redis = await createClient({ url: REDIS_URL }).connect()
  let left = events
  async function loop () {
    for (;;) {
      const jobs = await boss.fetch(queue, { batchSize })
      if (jobs.length === 0) { // in order, that may also be because other loops hold a job of every key
        if (left === 0) return
        await setTimeout(1)
        continue
      }
      const pipeline = redis.multi()
      for (const { id, data } of jobs) {
        pipeline.xAdd('events', '*', { id, type: data.type, partitionkey: data.key, data: JSON.stringify(data.data) })
      }
      await pipeline.execAsPipeline()
      await boss.deleteJob(queue, jobs.map(job => job.id))
      left -= jobs.length
    }
  }
  const begun = performance.now()
  await Promise.all(Array.from({ length: loops }, loop))
  console.log(JSON.stringify({ events, seconds: (performance.now() - begun) / 1000 }))
  await redis.close()
}

await boss.start()
await { fill, drain }[action]()
await boss.stop()
