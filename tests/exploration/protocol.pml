/* The protocol of one key, as small as it can be told: `queue`, a limit of one, at most one run pending.
 *
 * A transition has the name of the script in celery_coalesce/store/lua that makes it, and is one step, as a script is.
 * What is no script (publishing, acknowledging, a body) is a step of its own. A process may die after any of them,
 * messages may be lost or doubled, and a worker may miss its heartbeats: FAULTS times in one execution. There is no
 * clock: a timer is over when nobody has the message that it waits for, or, as a fault, before that.
 *
 * Left out, because they move nothing between these processes, or do so as one that is here:
 *   admit advance carry clear publish withdraw unpublished overdue hand limit show keys constraints history
 *
 * test_protocol.py runs it; with -DLATE tasks are acknowledged late. A mistake is put in by its name (NO_TIMER, NO_TOKEN,
 * ...), and must make a property fail.
 */

#ifndef FAULTS
#define FAULTS 1
#endif
#ifndef CALLS
#define CALLS 3    /* two of one producer and one of another; with 2, one each */
#endif
#define RUNS CALLS /* no call makes more than one run */
#define SWEEPER 2  /* an owner besides the workers 0 and 1; when it dies, another comes */
#define NO 9

mtype = { none, pending, dispatched, running, retrying, ended };

typedef Run {
  mtype state;
  bool timer, started;                /* started: no trigger may join it any more */
  byte token, owner, args, calls
};

/* The store: the key's runs, who has the slot, who waits; drains not announced; presences that ran out. */
Run rec[RUNS];
byte made, slot = NO, waiting = NO, last, drains;
bool over[SWEEPER + 1 + FAULTS];

/* The broker: the messages that name a run; and those of them that some process has in hand. */
byte msgs[RUNS], hand[RUNS];

/* Remembered by nobody, to be checked: what covers a call, the latest call of a run, ... */
byte cover[CALLS] = NO, latest[RUNS] = NO, holder[RUNS];
bool covered[CALLS], told[RUNS], begun[RUNS], body[2], lost[2], dead[2];
byte sessions, announced, announcing, producing = 2, faults = FAULTS, retries = 1;

#define idle (slot == NO && waiting == NO)
#define is_answered(t) (cover[t] == NO || covered[t] || told[cover[t]])
#define fresh(w) (body[w] && !over[w] && !lost[w])
#define holds(r, mine) (rec[r].state == running && rec[r].token == mine)
#define holds_nothing(w) (!(rec[0].state == running && rec[0].owner == w) \
  && !(rec[1].state == running && rec[1].owner == w) \
  && !(rec[RUNS - 1].state == running && rec[RUNS - 1].owner == w))
#define unstarted(r) (rec[r].state == dispatched || rec[r].state == retrying)
#define is_lost(r) (unstarted(r) && rec[r].timer && msgs[r] == 0 && hand[r] == 0)
#define leaderless(r) (rec[r].state == running && over[rec[r].owner])

/* -- transitions ------------------------------------------------------------------------------------------------- */

inline dispatched_now(r) {
  rec[r].state = dispatched; slot = r; hand[r]++;
#ifndef NO_TIMER
  rec[r].timer = true
#endif
}

inline granted(r, w, mine) { last++; mine = last; rec[r].token = mine; rec[r].owner = w; holder[r] = mine }

/* idle -> dispatched; busy -> pending; pending | dispatched -> the same, merged. mail: the run to be published. */
inline trigger(t, r, mail) {
  d_step {
    mail = NO;
    if
    :: idle -> sessions++; r = made; made++; dispatched_now(r); mail = r
#ifdef MERGE_INTO_RUNNING
    :: slot != NO -> r = slot
#else
    :: slot != NO && !rec[slot].started -> r = slot
#endif
    :: else -> if :: waiting == NO -> r = made; made++; rec[r].state = pending; waiting = r :: else -> r = waiting fi
    fi;
    assert(!rec[r].started);                          /* G2: it starts after the trigger was accepted */
    rec[r].args = t; rec[r].calls++; latest[r] = t; cover[t] = r
  }
}

/* dispatched -> (none), unless others have joined: then it is left to its timer. */
inline rollback(t, r) {
  d_step {
    hand[r]--;
    if
    :: rec[r].state == dispatched && !rec[r].started && rec[r].calls == 1 ->
      rec[r].state = ended; rec[r].timer = false; slot = NO; cover[t] = NO; sessions--; assert(waiting == NO)
    :: else
    fi
  }
}

/* dispatched | retrying -> running, with a new token; else the message is a duplicate, and there is none (0). */
inline start(r, w, mine) {
  d_step {
    mine = 0; hand[r]--;
    if
#ifdef RUN_TWICE
    :: rec[r].state == running || unstarted(r) ->
#else
    :: unstarted(r) ->
#endif
      rec[r].state = running; rec[r].timer = false; rec[r].started = true; over[w] = false; granted(r, w, mine)
    :: else
    fi
  }
}

/* running -> running; refused if the token is stale: then there is none any more. */
inline check(r, mine) { d_step { if :: holds(r, mine) :: else -> mine = 0 fi } }

/* running -> (none), and pending -> dispatched, or the last run -> drained. mail: the run to be published. */
inline finish(r, mine, mail, drained) {
  d_step {
    mail = NO; drained = false;
    if
#ifdef NO_TOKEN
    :: rec[r].state == running ->
#else
    :: holds(r, mine) ->
#endif
      assert(holder[r] == mine);                      /* G1: a stale run can not finish */
      rec[r].state = ended; slot = NO;
      if
#ifndef FORGET_PENDING
      :: waiting != NO -> mail = waiting; dispatched_now(mail); waiting = NO
#endif
      :: waiting == NO -> drains++; drained = true; announcing++
      :: else
      fi
    :: else
    fi
  }
}

/* running -> retrying; it keeps its slot. mail: the run to be published. */
inline retry(r, mine, mail) {
  d_step {
    mail = NO;
    if
    :: holds(r, mine) -> rec[r].state = retrying; rec[r].timer = true; begun[r] = false; hand[r]++; mail = r
    :: else
    fi
  }
}

/* running -> dispatched: the broker gives the message back. */
inline requeue(r, mine) {
  d_step { if :: holds(r, mine) -> rec[r].state = dispatched; rec[r].timer = true :: else fi }
}

/* running under a presence that ran out -> dispatched (late), or running under the sweeper, which ends it. */
inline lose(r, me, mine, mail) {
  d_step {
    mine = 0; mail = NO;
    if
#ifdef LOSE_LIVING
    :: rec[r].state == running ->
#else
    :: leaderless(r) ->
#endif
      if :: rec[r].owner < SWEEPER && over[rec[r].owner] -> lost[rec[r].owner] = true :: else fi;
#ifdef LATE
      rec[r].state = dispatched; rec[r].timer = true; hand[r]++; mail = r
#else
      granted(r, me, mine)
#endif
    :: else
    fi
  }
}

/* dispatched | retrying and overdue -> the same, to be published again. */
inline wake(r, mail) { hand[r]++; mail = r }

/* A presence is renewed, unless it was forgotten; one that holds nothing is. */
inline heartbeat(w) { over[w] = false }
inline bury(w) { over[w] = false; dead[w] = false }

/* drained -> (none): whoever takes the drain announces it. */
inline drain(drained) {
  d_step {
    if
    :: drains > 0 ->
#ifndef DRAIN_TWICE
      drains--;
#endif
      announced++; assert(announced <= sessions)      /* G4: never twice */
    :: else
    fi;
    if :: drained -> announcing--; drained = false :: else fi
  }
}

/* -- everything else --------------------------------------------------------------------------------------------- */

inline publish(mail) { d_step { if :: mail != NO -> msgs[mail]++; hand[mail]--; mail = NO :: else fi } }

/* One step, after which the process may be no more. */
#define STEP(what) atomic { what; if :: faults > 0 -> faults--; goto dies :: true fi }

#if CALLS == 3
#define FIRST(holds) if :: holds(0) -> r = 0 :: holds(1) -> r = 1 :: holds(2) -> r = 2 fi
#else
#define FIRST(holds) if :: holds(0) -> r = 0 :: holds(1) -> r = 1 fi
#endif
#define is_sent(r) (msgs[r] > 0)

proctype Producer(byte t; byte many) {
  byte r, mail = NO;
  do
  :: many > 0 ->
    STEP(trigger(t, r, mail));
    if
    :: publish(mail)
    :: atomic { mail != NO && faults > 0 -> faults--; rollback(t, r); mail = NO }
    fi;
    t++; many--; r = 0
  :: else -> break
  od;
dies: atomic { if :: mail != NO -> hand[mail]-- :: else fi; producing--; r = 0; t = 0; many = 0 }
}

proctype Worker(byte w) {
  byte r, t, mine, mail = NO; bool drained, acked;
end_idle:
  STEP(FIRST(is_sent); msgs[r]--; hand[r]++; mail = r);
  STEP(start(r, w, mine); mail = NO);
  if :: mine == 0 -> goto idles :: else fi;
#ifndef LATE
  STEP(acked = true);
#endif
  atomic {                                            /* the body begins */
    body[w] = true; lost[w] = (lost[w] && over[w]) || !holds(r, mine);
    assert(!(fresh(0) && fresh(1)));                  /* G1: not two at once under live leases */
#ifndef LATE
    assert(!begun[r]);                                /* an attempt is made once */
#endif
    assert(rec[r].args == latest[r]);                 /* G2: it sees the latest arguments */
    begun[r] = true; t = 0;
    do :: t < CALLS -> if :: cover[t] == r -> covered[t] = true :: else fi; t++ :: else -> break od; t = 0
  };
  if
  :: STEP(body[w] = false; check(r, mine))            /* it returns, and asks before anything follows from it */
  :: atomic { faults > 0 -> faults--; goto dies }
  :: atomic { faults > 0 -> faults--; body[w] = false; told[r] = true };     /* its child dies: the parent reports */
#ifdef LATE
    if :: atomic { requeue(r, mine); msgs[r]++; goto idles } :: true fi;
#endif
    STEP(finish(r, mine, mail, drained)); goto follows
  fi;
  if
  :: mine == 0 -> goto idles
  :: STEP(mine != 0 && retries > 0 -> retries--; retry(r, mine, mail))
  :: STEP(mine != 0 -> finish(r, mine, mail, drained))
  fi;
follows:
  if :: mail != NO -> STEP(publish(mail)) :: else fi;
  if :: drained -> drain(drained) :: else fi;
idles:
  atomic { mine = 0; mail = NO; acked = false; r = 0; goto end_idle };
dies:
  atomic {
    if :: mail != NO -> hand[mail]-- :: else fi;
    if :: drained -> announcing-- :: else fi;
    if :: !acked -> msgs[r]++ :: true fi;             /* the broker may have kept what was not acknowledged */
    body[w] = false; dead[w] = true; over[w] = true; mine = 0; mail = NO; acked = false; drained = false; r = 0
  };
  atomic { holds_nothing(w) -> bury(w); goto end_idle }
}

proctype Sweep() {
  byte me = SWEEPER, r, mine, mail = NO; bool drained;
end_look:
  if
  :: STEP(FIRST(leaderless));
    STEP(lose(r, me, mine, mail));
    if :: mine != 0 -> STEP(told[r] = true); STEP(finish(r, mine, mail, drained)) :: else fi
  :: STEP(FIRST(is_lost); wake(r, mail))
  :: atomic { unstarted(0) && rec[0].timer && faults > 0 -> faults--; wake(0, mail) }
  :: STEP(drains > announcing -> announcing++; drained = true)
  fi;
  if :: mail != NO -> STEP(publish(mail)) :: else fi;
  if :: drained -> drain(drained) :: else fi;
  atomic { mine = 0; r = 0; goto end_look };
dies:
  atomic {
    if :: mail != NO -> hand[mail]--; mail = NO :: else fi;
    if :: drained -> announcing--; drained = false :: else fi;
    over[me] = true; me++; mine = 0; r = 0; goto end_look
  }
}

/* What happens to messages and to heartbeats. */
proctype Fate() {
end_waits:
  do
  :: atomic { faults > 0 && msgs[0] > 0 -> faults--; msgs[0]-- }
  :: atomic { faults > 0 && msgs[0] > 0 -> faults--; msgs[0]++ }
  :: atomic { faults > 0 && msgs[1] > 0 -> faults--; msgs[1]-- }
  :: atomic { faults > 0 && !dead[0] && !over[0] -> faults--; over[0] = true }
  :: atomic { over[0] && !dead[0] -> heartbeat(0) }
  :: atomic { over[1] && !dead[1] -> heartbeat(1) }
  od
}

init { atomic { run Producer(0, CALLS - 1); run Producer(CALLS - 1, 1); run Worker(0); run Worker(1); run Sweep(); run Fate() } }

ltl covers { [] <> is_answered(0) && [] <> is_answered(1) && [] <> is_answered(CALLS - 1) }
ltl drained { <> [] (producing == 0 && idle && announced == sessions) }
