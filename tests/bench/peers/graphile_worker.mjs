// Graphile Worker, with the batching of the best figure in its documentation. It runs more jobs at once than the 24 there, from
// a local queue: so more jobs share a pipeline to Redis, which doubles the rate.
// https://worker.graphile.org/docs/performance, https://worker.graphile.org/docs/sql-add-job (add_jobs)
import { run, runMigrations } from 'graphile-worker'
import pg from 'pg'
import { createClient } from 'redis'

const { DATABASE_URL, REDIS_URL, EVENTS, PAYLOAD, KEYS } = process.env
const events = Number(EVENTS)

async function fill () {
  await runMigrations({ connectionString: DATABASE_URL })
  const database = new pg.Client({ connectionString: DATABASE_URL })
  await database.connect()
  await database.query(`
    select count(*) from graphile_worker.add_jobs((
      select array_agg(json_populate_record(null::graphile_worker.job_spec, json_build_object(
        'identifier', 'publish', 'payload', json_build_object(
          'type', 'order.created', 'key', 'order:' || (n % $2::int),
          'data', json_build_object('n', n, 'pad', repeat('x', greatest($3::int - 30, 0)))))) order by n)
      from generate_series(1, $1::int) n))`, [events, Number(KEYS), Number(PAYLOAD)])
  await database.end()
}

async function drain () {
  const redis = await createClient({ url: REDIS_URL }).connect()
  let left = events
  let finished
  const done = new Promise(resolve => { finished = resolve })
  const publish = async (payload, { job }) => {
    // Commands of the same turn of the event loop are sent in one pipeline.
    await redis.xAdd('events', '*', {
      id: job.id, type: payload.type, partitionkey: payload.key, data: JSON.stringify(payload.data)
    })
    if (--left === 0) finished()
  }
  const preset = {
    worker: {
      connectionString: DATABASE_URL,
      concurrentJobs: 200,
      maxPoolSize: 25,
      localQueue: { size: 1000 },
      completeJobBatchDelay: 0,
      failJobBatchDelay: 0
    }
  }
  const begun = performance.now()
  const runner = await run({ preset, taskList: { publish }, noHandleSignals: true })
  await done
  await runner.stop() // the last completions are written
  console.log(JSON.stringify({ events, seconds: (performance.now() - begun) / 1000 }))
  await redis.close()
}

process.env.NO_LOG_SUCCESS = '1' // a line per job otherwise
await { fill, drain }[process.argv[2]]()
